// AVX-512 with F, BW, VL, DQ and VPOPCNTDQ.
#pragma once

#include <immintrin.h>

#include "core/bits.h"
#include "core/compact.h"
#include "cpu/simd/common.h"

namespace engram::cpu::ENGRAM_ISA {

constexpr int kVectorBytes = 64;

using Bits = __m512i;
constexpr int kBitLanes = 8;
constexpr int64_t kCountSteps = int64_t{1} << 32;
constexpr int kTileRows = 8;  // samples in a register tile of binary_matmul; 8 x 2 accumulators of 32 registers
// With a gate fewer, for their distances need registers too: all are made before the first is counted. In turns, the
// operation of three operands would leave a quarter of Zen 4's slots idle.
constexpr int kGatedTileRows = 6;
constexpr bool kGateInStages = true;
constexpr int64_t kDotSamples = 3;
constexpr int kLookUpColumns = 8;
constexpr int kOuterRows = 8;
constexpr int kDrawVectors = 4;

ENGRAM_INLINE Bits bits_zero() { return _mm512_setzero_si512(); }
ENGRAM_INLINE Bits bits_load(const uint64_t* p) { return _mm512_loadu_si512(p); }
ENGRAM_INLINE void bits_store(uint64_t* p, Bits v) { _mm512_storeu_si512(p, v); }
ENGRAM_INLINE Bits bits_all(uint64_t v) { return _mm512_set1_epi64(static_cast<int64_t>(v)); }
ENGRAM_INLINE Bits differ(Bits a, Bits b) { return _mm512_xor_si512(a, b); }
ENGRAM_INLINE Bits differ_within(Bits a, Bits b, Bits g) { return _mm512_ternarylogic_epi64(a, b, g, 0x28); }
ENGRAM_INLINE Bits count(Bits v) { return _mm512_popcnt_epi64(v); }
constexpr int kGateParts = 1;
ENGRAM_INLINE void split_gate(uint64_t g, uint64_t* parts) { *parts = g; }
ENGRAM_INLINE Bits count_where(Bits a, Bits b, const uint64_t* parts) {
  return count(differ_within(a, b, bits_all(*parts)));
}
ENGRAM_INLINE void in_order(Bits& v) { asm volatile("" : "+v"(v)); }
ENGRAM_INLINE Bits add_count(Bits a, Bits b) { return _mm512_add_epi64(a, b); }
ENGRAM_INLINE Bits widen(Bits v) { return v; }
ENGRAM_INLINE Bits add_wide(Bits a, Bits b) { return _mm512_add_epi64(a, b); }
ENGRAM_INLINE int64_t bits_total(Bits v) { return _mm512_reduce_add_epi64(v); }
ENGRAM_INLINE Bits multiply_low(Bits a, Bits b) { return _mm512_mul_epu32(a, b); }
ENGRAM_INLINE Bits shift_down(Bits v) { return _mm512_srli_epi64(v, 32); }
ENGRAM_INLINE Bits join_low(Bits low, Bits high) {
  return _mm512_mask_shuffle_epi32(low, 0xAAAA, high, static_cast<_MM_PERM_ENUM>(0xA0));
}
ENGRAM_INLINE void store_low(uint32_t* p, Bits v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi64_epi32(v));
}
ENGRAM_INLINE Bits interleave_first(Bits a, Bits b) { return _mm512_unpacklo_epi64(a, b); }
ENGRAM_INLINE Bits interleave_second(Bits a, Bits b) { return _mm512_unpackhi_epi64(a, b); }

constexpr int kTransposeSize = 16;
template <typename T>
ENGRAM_INLINE void transpose_block(const T* in, int64_t in_stride, T* out, int64_t out_stride) {
  static_assert(sizeof(T) == sizeof(float));
  __m512 r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(in + i * in_stride);
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  // r[4 i + j]: column j of each 4 x 4 block of rows 4 i .. 4 i + 3
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xEE);
    r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
  }
  for (int j = 0; j < 4; ++j) {
    const __m512 low_even = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88);
    const __m512 low_odd = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xDD);
    const __m512 high_even = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88);
    const __m512 high_odd = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xDD);
    _mm512_storeu_ps(out + j * out_stride, _mm512_shuffle_f32x4(low_even, high_even, 0x88));
    _mm512_storeu_ps(out + (4 + j) * out_stride, _mm512_shuffle_f32x4(low_odd, high_odd, 0x88));
    _mm512_storeu_ps(out + (8 + j) * out_stride, _mm512_shuffle_f32x4(low_even, high_even, 0xDD));
    _mm512_storeu_ps(out + (12 + j) * out_stride, _mm512_shuffle_f32x4(low_odd, high_odd, 0xDD));
  }
}

using Floats = __m512;
using Mask = __mmask16;
constexpr int kLanes = 16;

ENGRAM_INLINE Floats zero() { return _mm512_setzero_ps(); }
ENGRAM_INLINE Floats load(const float* p) { return _mm512_loadu_ps(p); }
ENGRAM_INLINE void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
ENGRAM_INLINE Floats all(float v) { return _mm512_set1_ps(v); }
ENGRAM_INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
ENGRAM_INLINE Floats add_product(Floats acc, Floats a, Floats b) { return _mm512_fmadd_ps(a, b, acc); }
using Bits32 = uint32_t;
ENGRAM_INLINE Bits32 bits32(uint32_t bits) { return bits; }
ENGRAM_INLINE Mask mask_of(Bits32 bits, int group) { return static_cast<Mask>(bits >> (16 * group)); }
ENGRAM_INLINE Floats keep_where(Mask m, Floats v) { return _mm512_maskz_mov_ps(m, v); }

#define ENGRAM_HAS_LOOK_UP
constexpr int kTableSigns = 4;
ENGRAM_INLINE Floats flip_where(uint32_t lanes, Floats v) {
  const __m512i flipped = _mm512_mask_xor_epi32(_mm512_castps_si512(v), static_cast<__mmask16>(lanes),
                                                _mm512_castps_si512(v), _mm512_set1_epi32(INT32_MIN));
  return _mm512_castsi512_ps(flipped);
}
ENGRAM_INLINE Bits load_indices(const uint32_t* p) { return _mm512_loadu_si512(p); }
ENGRAM_INLINE Floats look_up(Floats table, Bits indices) { return _mm512_permutexvar_ps(indices, table); }
ENGRAM_INLINE Bits next_indices(Bits indices) { return _mm512_srli_epi32(indices, kTableSigns); }

ENGRAM_INLINE uint64_t signs_of_64(const float* x, bool& nan) {
  uint64_t word = 0;
  unsigned unordered = 0;
  for (int g = 0; g < 4; ++g) {
    const __m512 v = _mm512_loadu_ps(x + 16 * g);
    word |= static_cast<uint64_t>(_mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_GE_OQ)) << (16 * g);
    unordered |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  }
  nan |= unordered != 0;
  return word;
}
ENGRAM_INLINE uint64_t signs_of_64(const uint16_t* x, uint16_t infinity, bool& nan) {
  uint64_t word = 0;
  uint32_t unordered = 0;
  for (int g = 0; g < 2; ++g) {
    const __m512i v = _mm512_loadu_si512(x + 32 * g);
    const __m512i magnitude = _mm512_and_si512(v, _mm512_set1_epi16(0x7FFF));
    const uint32_t negative = _mm512_movepi16_mask(v) & _mm512_test_epi16_mask(magnitude, magnitude);
    word |= static_cast<uint64_t>(~negative) << (32 * g);
    unordered |= _mm512_cmpgt_epi16_mask(magnitude, _mm512_set1_epi16(static_cast<int16_t>(infinity)));
  }
  nan |= unordered != 0;
  return word;
}
ENGRAM_INLINE uint64_t window_of_64(const float* x, float width) {
  uint64_t word = 0;
  for (int g = 0; g < 4; ++g) {
    const __m512 v = _mm512_abs_ps(_mm512_loadu_ps(x + 16 * g));
    word |= static_cast<uint64_t>(_mm512_cmp_ps_mask(v, _mm512_set1_ps(width), _CMP_LE_OQ)) << (16 * g);
  }
  return word;
}

#define ENGRAM_HAS_COMPACT
// The high halves of two vectors of 32-bit numbers.
ENGRAM_INLINE __m512i high_halves(__m512i a, __m512i b) {
  alignas(64) static constexpr uint16_t kOdd[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                    33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return _mm512_permutex2var_epi16(a, _mm512_load_si512(kOdd), b);
}
ENGRAM_INLINE void write_bfloat16(const float* x, const uint32_t* noise, uint16_t* to) {
  __m512i sums[4];
  for (int g = 0; g < 4; ++g) sums[g] = _mm512_add_epi32(_mm512_loadu_si512(x + 16 * g), load_indices(noise + 16 * g));
  for (int h = 0; h < 2; ++h) _mm512_storeu_si512(to + 32 * h, high_halves(sums[2 * h], sums[2 * h + 1]));
}
ENGRAM_INLINE uint32_t largest_magnitude(const float* x) {
  __m512i largest = _mm512_setzero_si512();
  for (int g = 0; g < 4; ++g) {
    const __m512i magnitudes = _mm512_and_si512(_mm512_loadu_si512(x + 16 * g), _mm512_set1_epi32(INT32_MAX));
    largest = _mm512_max_epu32(largest, magnitudes);
  }
  return _mm512_reduce_max_epu32(largest);
}

// Of the floats of codes the upper half holds every bit that is not 0; those of code 0 are `zero_bits`. A vector of
// codes has its lanes' quarters in the order in which unpacking leaves them.
ENGRAM_INLINE void floats_of_codes(__m512i codes, uint32_t zero_bits, __m512* floats) {
  const __m512i unpacking = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i none = _mm512_setzero_si512(), from = _mm512_permutexvar_epi32(unpacking, codes);
  const __m512i above = _mm512_set1_epi16(static_cast<int16_t>(zero_bits >> 16));
  const __m512i bytes[2] = {_mm512_unpacklo_epi8(from, none), _mm512_unpackhi_epi8(from, none)};
  const __m512 zero = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(zero_bits)));
  for (int h = 0; h < 2; ++h) {
    const __m512i upper = _mm512_add_epi16(_mm512_slli_epi16(bytes[h], kDrop - 16), above);
    floats[2 * h] = _mm512_sub_ps(_mm512_castsi512_ps(_mm512_unpacklo_epi16(none, upper)), zero);
    floats[2 * h + 1] = _mm512_sub_ps(_mm512_castsi512_ps(_mm512_unpackhi_epi16(none, upper)), zero);
  }
}
ENGRAM_INLINE void read_first_moments(const int8_t* codes, float scale, float* to) {
  const __m512i held = _mm512_loadu_si512(codes);
  const uint64_t negative = _mm512_movepi8_mask(held);
  const __m512 by = _mm512_set1_ps(scale), minus = _mm512_set1_ps(-scale);
  __m512 floats[4];
  floats_of_codes(_mm512_abs_epi8(held), kFirstBits, floats);
  for (int g = 0; g < 4; ++g) {
    const __m512 signed_scale = _mm512_mask_mov_ps(by, static_cast<__mmask16>(negative >> 16 * g), minus);
    store(to + 16 * g, _mm512_mul_ps(floats[g], signed_scale));
  }
}
ENGRAM_INLINE void read_second_moments(const uint8_t* codes, float scale, float* to) {
  __m512 floats[4];
  floats_of_codes(_mm512_loadu_si512(codes), kSecondBits, floats);
  for (int g = 0; g < 4; ++g) store(to + 16 * g, _mm512_mul_ps(floats[g], _mm512_set1_ps(scale)));
}

// The codes of magnitudes as integers of 16 bits, which the packing that follows saturates.
ENGRAM_INLINE void wide_codes(const __m512* magnitudes, float reciprocal, uint32_t zero_bits, const uint32_t* noise,
                              __m512i* codes) {
  const __m512 zero = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(zero_bits)));
  const __m512i below = _mm512_set1_epi16(static_cast<int16_t>(zero_bits >> kDrop));
  __m512i sums[4];
  for (int g = 0; g < 4; ++g) {
    const __m512 value = _mm512_add_ps(_mm512_mul_ps(magnitudes[g], _mm512_set1_ps(reciprocal)), zero);
    sums[g] = _mm512_add_epi32(_mm512_castps_si512(value), load_indices(noise + 16 * g));
  }
  for (int h = 0; h < 2; ++h)
    codes[h] = _mm512_sub_epi16(_mm512_srli_epi16(high_halves(sums[2 * h], sums[2 * h + 1]), kDrop - 16), below);
}
ENGRAM_INLINE __m512i packing_undone(__m512i bytes) {
  return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), bytes);
}
ENGRAM_INLINE void write_first_moments(const float* x, float reciprocal, const uint32_t* noise, int8_t* to) {
  __m512 magnitudes[4];
  uint64_t negative = 0;
  for (int g = 0; g < 4; ++g) {
    const __m512 v = load(x + 16 * g);
    negative |= static_cast<uint64_t>(_mm512_cmp_ps_mask(v, zero(), _CMP_LT_OQ)) << (16 * g);
    magnitudes[g] = _mm512_abs_ps(v);
  }
  __m512i wide[2];
  wide_codes(magnitudes, reciprocal, kFirstBits, noise, wide);
  const __m512i codes = packing_undone(_mm512_packs_epi16(wide[0], wide[1]));
  _mm512_storeu_si512(to, _mm512_mask_sub_epi8(codes, negative, _mm512_setzero_si512(), codes));
}
ENGRAM_INLINE void write_second_moments(const float* x, float reciprocal, const uint32_t* noise, uint8_t* to) {
  const __m512 values[4] = {load(x), load(x + 16), load(x + 32), load(x + 48)};
  __m512i wide[2];
  wide_codes(values, reciprocal, kSecondBits, noise, wide);
  const __m512i codes = packing_undone(_mm512_packus_epi16(wide[0], wide[1]));
  _mm512_storeu_si512(to, _mm512_max_epu8(codes, _mm512_set1_epi8(1)));
}

ENGRAM_INLINE void transpose_words(const uint64_t* in, int64_t in_stride, uint64_t* out, int64_t out_stride) {
  __m512i even[4], odd[4];
  for (int i = 0; i < 4; ++i) {
    const __m512i a = bits_load(in + 2 * i * in_stride), b = bits_load(in + (2 * i + 1) * in_stride);
    even[i] = _mm512_unpacklo_epi64(a, b), odd[i] = _mm512_unpackhi_epi64(a, b);
  }
  // quarters 0 and 2, or 1 and 3, of two vectors, twice over: column j is quarter j / 2 of even or odd
  for (int j = 0; j < 2; ++j) {
    const __m512i* from = j == 0 ? even : odd;
    const __m512i low02 = _mm512_shuffle_i64x2(from[0], from[1], 0x88);
    const __m512i low13 = _mm512_shuffle_i64x2(from[0], from[1], 0xDD);
    const __m512i high02 = _mm512_shuffle_i64x2(from[2], from[3], 0x88);
    const __m512i high13 = _mm512_shuffle_i64x2(from[2], from[3], 0xDD);
    bits_store(out + j * out_stride, _mm512_shuffle_i64x2(low02, high02, 0x88));
    bits_store(out + (j + 2) * out_stride, _mm512_shuffle_i64x2(low13, high13, 0x88));
    bits_store(out + (j + 4) * out_stride, _mm512_shuffle_i64x2(low02, high02, 0xDD));
    bits_store(out + (j + 6) * out_stride, _mm512_shuffle_i64x2(low13, high13, 0xDD));
  }
}

#define ENGRAM_HAS_SUBSET_LOOK_UP
using Shorts = __m512i;
struct SubsetSums {
  Shorts low, high;
};
ENGRAM_INLINE Shorts shorts_load(const uint16_t* p) { return _mm512_loadu_si512(p); }
ENGRAM_INLINE void shorts_store(uint16_t* p, Shorts v) { _mm512_storeu_si512(p, v); }
ENGRAM_INLINE Shorts shorts_add(Shorts a, Shorts b) { return _mm512_add_epi16(a, b); }
ENGRAM_INLINE Shorts shorts_high_bytes(Shorts v) { return _mm512_srli_epi16(v, 8); }
// The numbers 0 to 5 and 6 to 11 of x, of which 16 bytes are read; true if one of them is not 0.
ENGRAM_INLINE bool read_six_numbers(const uint8_t* x, SixNumbers* six) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  const __m128i halves = _mm_shuffle_epi8(bytes, _mm_setr_epi8(0, 1, 2, 3, 4, 5, -1, -1, 6, 7, 8, 9, 10, 11, -1, -1));
  const __m128i sums = _mm_sad_epu8(halves, _mm_setzero_si128());
  const __m128i first = _mm_setr_epi8(1, 2, 3, 4, -1, -1, 0, -1, 5, -1, 5, -1, -1, -1, -1, -1);
  const __m128i second = _mm_setr_epi8(7, 8, 9, 10, -1, -1, 6, -1, 11, -1, 11, -1, -1, -1, -1, -1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(six),
                   _mm_or_si128(_mm_shuffle_epi8(bytes, first), _mm_slli_si128(sums, 12)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(six + 1),
                   _mm_or_si128(_mm_shuffle_epi8(bytes, second), _mm_slli_si128(_mm_unpackhi_epi64(sums, sums), 12)));
  return _mm_test_epi64_mask(halves, halves) != 0;
}
ENGRAM_INLINE SubsetSums subset_sums(const SixNumbers& x) {
  // Number i counts where bit i of the lane's own number is 1: numbers 1 to 4 by the bits of the lane of 32 bits,
  // number 0 in its upper half, number 5 in the second register.
  const auto chosen = [](uint64_t bytes) { return _mm512_maskz_set1_epi8(bytes, 1); };
  const Shorts pairs = _mm512_maddubs_epi16(_mm512_set1_epi32(static_cast<int>(x.middle)), chosen(0xFEDCBA9876543210));
  const Shorts both = _mm512_add_epi16(pairs, _mm512_rol_epi32(pairs, 16));
  const Shorts low = _mm512_add_epi32(both, _mm512_set1_epi32(static_cast<int>(x.first)));
  return {low, _mm512_add_epi32(low, _mm512_set1_epi32(static_cast<int>(x.last)))};
}
ENGRAM_INLINE Shorts look_up_subset(const SubsetSums& table, Shorts indices) {
  return _mm512_permutex2var_epi16(table.low, indices, table.high);
}
ENGRAM_INLINE void add_twice(int32_t* y, Shorts sums, int32_t less, bool to_y) {
  const __m512i halves[] = {_mm512_cvtepu16_epi32(_mm512_castsi512_si256(sums)),
                            _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(sums, 1))};
  for (int h = 0; h < 2; ++h) {
    const __m512i before = to_y ? _mm512_loadu_si512(y + 16 * h) : _mm512_setzero_si512();
    const __m512i twice = _mm512_add_epi32(halves[h], halves[h]);
    _mm512_storeu_si512(y + 16 * h, _mm512_add_epi32(before, _mm512_sub_epi32(twice, _mm512_set1_epi32(less))));
  }
}

ENGRAM_INLINE __m512i thresholds_of(OneThreshold t, int) { return _mm512_set1_epi32(t.value); }
ENGRAM_INLINE __m512i thresholds_of(ThresholdEach t, int first) { return _mm512_loadu_si512(t.values + first); }
template <typename Threshold>
ENGRAM_INLINE uint64_t at_least_64(const int32_t* y, const Threshold& threshold) {
  const auto reached = [&](int g) {
    return _mm512_cmpge_epi32_mask(_mm512_loadu_si512(y + 16 * g), thresholds_of(threshold, 16 * g));
  };
  return _mm512_kunpackd(_mm512_kunpackw(reached(3), reached(2)), _mm512_kunpackw(reached(1), reached(0)));
}

}  // namespace engram::cpu::ENGRAM_ISA
