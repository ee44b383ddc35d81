// AVX2 with FMA.
#pragma once

#include <immintrin.h>

#include "cpu/simd/common.h"

namespace engram::cpu::ENGRAM_ISA {

constexpr int kVectorBytes = 32;

using Bits = __m256i;
constexpr int kBitLanes = 4;
constexpr int64_t kCountSteps = 31;  // a byte holds at most 31 counts of up to 8
constexpr int kTileRows = 4;
constexpr int kGatedTileRows = 4;
constexpr bool kGateInStages = false;
constexpr int64_t kDotSamples = 8;  // more than elsewhere, since counting is slow
constexpr int kLookUpColumns = 4;
constexpr int kOuterRows = 4;
constexpr int kDrawVectors = 2;

ENGRAM_INLINE Bits bits_zero() { return _mm256_setzero_si256(); }
ENGRAM_INLINE Bits bits_load(const uint64_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
ENGRAM_INLINE void bits_store(uint64_t* p, Bits v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
ENGRAM_INLINE Bits bits_all(uint64_t v) { return _mm256_set1_epi64x(static_cast<int64_t>(v)); }
ENGRAM_INLINE Bits differ(Bits a, Bits b) { return _mm256_xor_si256(a, b); }
ENGRAM_INLINE Bits differ_within(Bits a, Bits b, Bits g) { return _mm256_and_si256(_mm256_xor_si256(a, b), g); }
ENGRAM_INLINE Bits nibble_counts() {
  return _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,  //
                          0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
}
ENGRAM_INLINE Bits count(Bits v) {  // nibble look-up (Mula, Kurz, Lemire 2018)
  const Bits low = _mm256_set1_epi8(0x0F);
  return _mm256_add_epi8(_mm256_shuffle_epi8(nibble_counts(), _mm256_and_si256(v, low)),
                         _mm256_shuffle_epi8(nibble_counts(), _mm256_and_si256(_mm256_srli_epi16(v, 4), low)));
}
constexpr int kGateParts = 2;
ENGRAM_INLINE void split_gate(uint64_t g, uint64_t* parts) {
  parts[0] = g & 0x0F0F0F0F0F0F0F0Fu;
  parts[1] = g >> 4 & 0x0F0F0F0F0F0F0F0Fu;
}
ENGRAM_INLINE Bits count_where(Bits a, Bits b, const uint64_t* parts) {  // the gate takes the place of count's masks
  const Bits v = _mm256_xor_si256(a, b);
  return _mm256_add_epi8(
      _mm256_shuffle_epi8(nibble_counts(), _mm256_and_si256(v, bits_all(parts[0]))),
      _mm256_shuffle_epi8(nibble_counts(), _mm256_and_si256(_mm256_srli_epi16(v, 4), bits_all(parts[1]))));
}
ENGRAM_INLINE void in_order(Bits& v) { asm volatile("" : "+x"(v)); }
ENGRAM_INLINE Bits add_count(Bits a, Bits b) { return _mm256_add_epi8(a, b); }
ENGRAM_INLINE Bits widen(Bits v) { return _mm256_sad_epu8(v, _mm256_setzero_si256()); }
ENGRAM_INLINE Bits add_wide(Bits a, Bits b) { return _mm256_add_epi64(a, b); }
ENGRAM_INLINE Bits multiply_low(Bits a, Bits b) { return _mm256_mul_epu32(a, b); }
ENGRAM_INLINE Bits shift_down(Bits v) { return _mm256_srli_epi64(v, 32); }
ENGRAM_INLINE Bits join_low(Bits low, Bits high) { return _mm256_blend_epi32(low, _mm256_slli_epi64(high, 32), 0xAA); }
ENGRAM_INLINE void store_low(uint32_t* p, Bits v) {
  const Bits halves = _mm256_permutevar8x32_epi32(v, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(halves));
}
ENGRAM_INLINE Bits interleave_first(Bits a, Bits b) { return _mm256_unpacklo_epi64(a, b); }
ENGRAM_INLINE Bits interleave_second(Bits a, Bits b) { return _mm256_unpackhi_epi64(a, b); }
ENGRAM_INLINE int64_t bits_total(Bits v) {
  const __m128i s = _mm_add_epi64(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  return _mm_cvtsi128_si64(_mm_add_epi64(s, _mm_unpackhi_epi64(s, s)));
}

constexpr int kTransposeSize = 8;
template <typename T>
ENGRAM_INLINE void transpose_block(const T* in, int64_t in_stride, T* out, int64_t out_stride) {
  static_assert(sizeof(T) == sizeof(float));
  __m256 r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(in + i * in_stride));
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(reinterpret_cast<float*>(out + i * out_stride), _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(reinterpret_cast<float*>(out + (i + 4) * out_stride),
                     _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}

using Floats = __m256;
using Mask = __m256;
constexpr int kLanes = 8;

ENGRAM_INLINE Floats zero() { return _mm256_setzero_ps(); }
ENGRAM_INLINE Floats load(const float* p) { return _mm256_loadu_ps(p); }
ENGRAM_INLINE void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
ENGRAM_INLINE Floats all(float v) { return _mm256_set1_ps(v); }
ENGRAM_INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
ENGRAM_INLINE Floats add_product(Floats acc, Floats a, Floats b) { return _mm256_fmadd_ps(a, b, acc); }
using Bits32 = __m256i;
ENGRAM_INLINE Bits32 bits32(uint32_t bits) { return _mm256_set1_epi32(static_cast<int>(bits)); }
ENGRAM_INLINE Mask mask_of(Bits32 bits, int group) {  // the lane's bit, moved to the sign, by which blendv selects
  const int top = 31 - 8 * group;
  const __m256i shift = _mm256_setr_epi32(top, top - 1, top - 2, top - 3, top - 4, top - 5, top - 6, top - 7);
  return _mm256_castsi256_ps(_mm256_sllv_epi32(bits, shift));
}
ENGRAM_INLINE Floats keep_where(Mask m, Floats v) { return _mm256_blendv_ps(_mm256_setzero_ps(), v, m); }

#define ENGRAM_HAS_LOOK_UP
constexpr int kTableSigns = 3;
ENGRAM_INLINE Floats flip_where(uint32_t lanes, Floats v) {
  const __m256i bits = _mm256_set1_epi32(static_cast<int>(lanes));
  const __m256i to_sign = _mm256_sllv_epi32(bits, _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24));
  return _mm256_xor_ps(v, _mm256_and_ps(_mm256_castsi256_ps(to_sign), _mm256_set1_ps(-0.0f)));
}
ENGRAM_INLINE Bits load_indices(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
ENGRAM_INLINE Floats look_up(Floats table, Bits indices) { return _mm256_permutevar8x32_ps(table, indices); }
ENGRAM_INLINE Bits next_indices(Bits indices) { return _mm256_srli_epi32(indices, kTableSigns); }

ENGRAM_INLINE uint64_t signs_of_64(const float* x, bool& nan) {
  uint64_t word = 0;
  int unordered = 0;
  for (int g = 0; g < 8; ++g) {
    const __m256 v = _mm256_loadu_ps(x + 8 * g);
    const int ge = _mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_GE_OQ));
    word |= static_cast<uint64_t>(static_cast<unsigned>(ge)) << (8 * g);
    unordered |= _mm256_movemask_ps(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  }
  nan |= unordered != 0;
  return word;
}
ENGRAM_INLINE uint64_t signs_of_64(const uint16_t* x, uint16_t infinity, bool& nan) {
  uint64_t word = 0;
  int unordered = 0;
  for (int g = 0; g < 2; ++g) {
    __m256i negative[2];
    for (int h = 0; h < 2; ++h) {
      const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 32 * g + 16 * h));
      const __m256i magnitude = _mm256_and_si256(v, _mm256_set1_epi16(0x7FFF));
      negative[h] = _mm256_and_si256(_mm256_srai_epi16(v, 15), _mm256_cmpgt_epi16(magnitude, _mm256_setzero_si256()));
      const __m256i above = _mm256_cmpgt_epi16(magnitude, _mm256_set1_epi16(static_cast<int16_t>(infinity)));
      unordered |= _mm256_movemask_epi8(above);
    }
    // packs works within 128-bit halves; the permutation puts the bytes back into order
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(negative[0], negative[1]), 0xD8);
    word |= static_cast<uint64_t>(~static_cast<uint32_t>(_mm256_movemask_epi8(bytes))) << (32 * g);
  }
  nan |= unordered != 0;
  return word;
}
ENGRAM_INLINE uint64_t window_of_64(const float* x, float width) {
  uint64_t word = 0;
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
  for (int g = 0; g < 8; ++g) {
    const __m256 v = _mm256_and_ps(_mm256_loadu_ps(x + 8 * g), magnitude);
    const int le = _mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_set1_ps(width), _CMP_LE_OQ));
    word |= static_cast<uint64_t>(static_cast<unsigned>(le)) << (8 * g);
  }
  return word;
}

using Lanes = uint32_t __attribute__((vector_size(kVectorBytes), aligned(kVectorBytes)));
ENGRAM_INLINE Floats square_root(Floats v) { return _mm256_sqrt_ps(v); }
ENGRAM_INLINE Floats within(Floats v, Floats bound) {
  return _mm256_max_ps(_mm256_min_ps(v, bound), _mm256_xor_ps(bound, _mm256_set1_ps(-0.0f)));
}
ENGRAM_INLINE Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }
ENGRAM_INLINE Lanes smaller_of(Lanes a, Lanes b) { return a < b ? a : b; }
ENGRAM_INLINE uint32_t largest_lane(Lanes v) {
  const auto both = reinterpret_cast<__m256i>(v);
  __m128i most = _mm_max_epu32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
  most = _mm_max_epu32(most, _mm_shuffle_epi32(most, 0x4E));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_max_epu32(most, _mm_shuffle_epi32(most, 0xB1))));
}
ENGRAM_INLINE bool any_at_least(Lanes v, uint32_t limit) { return largest_lane(v) >= limit; }
ENGRAM_INLINE bool any_nan(const Floats* v) {
  __m256 unordered = _mm256_setzero_ps();
  for (int g = 0; g < 8; g += 2) unordered = _mm256_or_ps(unordered, _mm256_cmp_ps(v[g], v[g + 1], _CMP_UNORD_Q));
  return _mm256_movemask_ps(unordered) != 0;
}
ENGRAM_INLINE uint64_t signs_of(const Floats* x) {
  uint64_t word = 0;
  for (int g = 0; g < 8; ++g) {
    const int ge = _mm256_movemask_ps(_mm256_cmp_ps(x[g], _mm256_setzero_ps(), _CMP_GE_OQ));
    word |= static_cast<uint64_t>(static_cast<unsigned>(ge)) << (8 * g);
  }
  return word;
}
ENGRAM_INLINE uint64_t signs_of(const uint16_t* x) {
  bool nan = false;
  return signs_of_64(x, 0x7F80, nan);
}

ENGRAM_INLINE Lanes widened(const uint16_t* from) {
  return reinterpret_cast<Lanes>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
ENGRAM_INLINE Lanes widened(const int8_t* from) {
  return reinterpret_cast<Lanes>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
ENGRAM_INLINE Lanes widened(const uint8_t* from) {
  return reinterpret_cast<Lanes>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
// Packing works within 128-bit halves; a permutation puts the numbers back into order.
ENGRAM_INLINE void narrow(const Lanes* from, uint16_t* to) {
  const auto v = reinterpret_cast<const __m256i*>(from);
  for (int g = 0; g < 4; ++g)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 16 * g),
                        _mm256_permute4x64_epi64(_mm256_packus_epi32(v[2 * g], v[2 * g + 1]), 0xD8));
}
ENGRAM_INLINE __m256i packed_words(const Lanes* from, int first) {
  const auto v = reinterpret_cast<const __m256i*>(from);
  return _mm256_packs_epi32(v[first], v[first + 1]);
}
ENGRAM_INLINE void narrow(const Lanes* from, int8_t* to) {
  for (int g = 0; g < 2; ++g)
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(to + 32 * g),
        _mm256_permutevar8x32_epi32(_mm256_packs_epi16(packed_words(from, 4 * g), packed_words(from, 4 * g + 2)),
                                    _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
}
ENGRAM_INLINE void narrow(const Lanes* from, uint8_t* to) {
  for (int g = 0; g < 2; ++g)
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(to + 32 * g),
        _mm256_permutevar8x32_epi32(_mm256_packus_epi16(packed_words(from, 4 * g), packed_words(from, 4 * g + 2)),
                                    _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
}

ENGRAM_INLINE void transpose_words(const uint64_t* in, int64_t in_stride, uint64_t* out, int64_t out_stride) {
  transpose_plainly<kBitLanes>(in, in_stride, out, out_stride);
}

ENGRAM_INLINE __m256i thresholds_of(OneThreshold t, int) { return _mm256_set1_epi32(t.value); }
ENGRAM_INLINE __m256i thresholds_of(ThresholdEach t, int first) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(t.values + first));
}
template <typename Threshold>
ENGRAM_INLINE uint64_t at_least_64(const int32_t* y, const Threshold& threshold) {
  uint64_t below = 0;
  for (int g = 0; g < 8; ++g) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(y + 8 * g));
    const __m256i less = _mm256_cmpgt_epi32(thresholds_of(threshold, 8 * g), v);
    below |= static_cast<uint64_t>(static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(less)))) << (8 * g);
  }
  return ~below;
}

}  // namespace engram::cpu::ENGRAM_ISA
