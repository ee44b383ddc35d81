// AVX-512 with F, BW, VL, DQ, VBMI and VPOPCNTDQ.
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

using Lanes = uint32_t __attribute__((vector_size(kVectorBytes), aligned(kVectorBytes)));
ENGRAM_INLINE Floats square_root(Floats v) { return _mm512_sqrt_ps(v); }
ENGRAM_INLINE Floats within(Floats v, Floats bound) { return _mm512_range_ps(v, bound, 0x2); }
ENGRAM_INLINE Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }
ENGRAM_INLINE Lanes smaller_of(Lanes a, Lanes b) { return a < b ? a : b; }
ENGRAM_INLINE uint32_t largest_lane(Lanes v) { return _mm512_reduce_max_epu32(reinterpret_cast<__m512i>(v)); }
ENGRAM_INLINE bool any_at_least(Lanes v, uint32_t limit) {
  return _mm512_cmpge_epu32_mask(reinterpret_cast<__m512i>(v), _mm512_set1_epi32(static_cast<int>(limit))) != 0;
}
ENGRAM_INLINE bool any_nan(const Floats* v) {
  return (_mm512_cmp_ps_mask(v[0], v[1], _CMP_UNORD_Q) | _mm512_cmp_ps_mask(v[2], v[3], _CMP_UNORD_Q)) != 0;
}
ENGRAM_INLINE uint64_t signs_of(const Floats* x) {
  const auto signs = [&](int g) { return _mm512_cmp_ps_mask(x[g], _mm512_setzero_ps(), _CMP_GE_OQ); };
  return _mm512_kunpackd(_mm512_kunpackw(signs(3), signs(2)), _mm512_kunpackw(signs(1), signs(0)));
}
ENGRAM_INLINE uint64_t signs_of(const uint16_t* x) {  // every positive value, and -0
  const __m512i zero = _mm512_set1_epi16(INT16_MIN);
  return _mm512_kunpackd(_mm512_cmple_epu16_mask(_mm512_loadu_si512(x + 32), zero),
                         _mm512_cmple_epu16_mask(_mm512_loadu_si512(x), zero));
}

ENGRAM_INLINE Lanes widened(const uint16_t* from) {
  return reinterpret_cast<Lanes>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
}

#define ENGRAM_HAS_COMPACT
ENGRAM_INLINE void read_bfloat16(const uint16_t* from, Floats* to) {
  alignas(64) static constexpr uint16_t kFirst[32] = {0, 0, 0, 1, 0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,
                                                      0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
  const __m512i first = _mm512_load_si512(kFirst), second = _mm512_or_si512(first, _mm512_set1_epi16(16));
  for (int h = 0; h < 2; ++h) {
    const __m512i v = _mm512_loadu_si512(from + 32 * h);
    to[2 * h] = _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, first, v));
    to[2 * h + 1] = _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, second, v));
  }
}
// The high halves of sums.
ENGRAM_INLINE void write_bfloat16(const Lanes* sums, uint16_t* to) {
  alignas(64) static constexpr uint16_t kOdd[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                    33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  const __m512i odd = _mm512_load_si512(kOdd);
  for (int h = 0; h < 2; ++h) {
    const auto a = reinterpret_cast<__m512i>(sums[2 * h]), b = reinterpret_cast<__m512i>(sums[2 * h + 1]);
    _mm512_storeu_si512(to + 32 * h, _mm512_permutex2var_epi16(a, odd, b));
  }
}
// Constants that are loaded: a compiler that sees their values makes each anew, by a move between register files.
struct CompactConstants {
  uint32_t sign, magnitude, first_zero, second_zero, first_carry, second_carry, exponent, limit, twice, negative;
  uint32_t first_shift, second_shift;
  uint16_t sign16, first_shift16, second_shift16, places;
  uint64_t pairs[3];
  uint8_t flip, one;
};
constexpr uint32_t kOneBits = uint32_t{127} << 23;
static const CompactConstants kCompactConstants = {
    0x80000000u,
    0x7FFFFFFFu,
    kFirstBits,
    kSecondBits,
    kFirstCarry,
    kSecondCarry,
    0x7F800000u,
    uint32_t{253} << 23,
    uint32_t{254} << 23,
    kFirstBits + (uint32_t{128} << kDrop) + (uint32_t{1} << kDrop) - 1,
    kFirstBits - kOneBits,
    kSecondBits - kOneBits,
    0x8000u,
    static_cast<uint16_t>((kFirstBits - kOneBits) >> 16),
    static_cast<uint16_t>((kSecondBits - kOneBits) >> 16),
    kDrop | (kDrop + 32) << 8,
    {uint64_t{0xFFFF} << 16, uint64_t{0xFFFF} << 32, uint64_t{0xFFFF} << 48},
    128,
    1};
ENGRAM_INLINE const CompactConstants& compact_constants() {
  const CompactConstants* constants = &kCompactConstants;
  asm("" : "+r"(constants));
  return *constants;
}
ENGRAM_INLINE __m512i each32(uint32_t v) { return _mm512_set1_epi32(static_cast<int>(v)); }
ENGRAM_INLINE __m512i each16(uint16_t v) { return _mm512_set1_epi16(static_cast<int16_t>(v)); }

// Of the floats of codes the upper half holds every bit that is not 0. Quarters of 4 bytes are ordered such that
// unpacking twice leaves the codes in order.
ENGRAM_INLINE __m512i before_unpacking(const void* codes) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, _mm512_loadu_si512(codes));
}
ENGRAM_INLINE uint16_t upper_half(const float* v) {
  uint16_t halves[2];
  memcpy(halves, v, sizeof halves);
  return halves[1];
}
ENGRAM_INLINE void read_first_moments(const int8_t* codes, const float* scale, Floats* to) {
  const CompactConstants& c = compact_constants();
  const __m512i from = before_unpacking(codes), none = _mm512_setzero_si512();
  const __m512i sign16 = each16(c.sign16), sign = each32(c.sign);
  const __m512i zero16 = _mm512_add_epi16(each16(upper_half(scale)), each16(c.first_shift16));
  const __m512i zero = _mm512_add_epi32(_mm512_castps_si512(_mm512_set1_ps(*scale)), each32(c.first_shift));
  const __m512i high[2] = {_mm512_unpacklo_epi8(none, from), _mm512_unpackhi_epi8(none, from)};
  for (int h = 0; h < 2; ++h) {
    const __m512i positive = _mm512_add_epi16(_mm512_srli_epi16(_mm512_abs_epi16(high[h]), 24 - kDrop), zero16);
    const __m512i upper = _mm512_ternarylogic_epi64(high[h], sign16, positive, 0xEA);  // (high & sign) | positive
    const __m512i values[2] = {_mm512_unpacklo_epi16(none, upper), _mm512_unpackhi_epi16(none, upper)};
    for (int i = 0; i < 2; ++i) {
      const __m512i signed_zero = _mm512_ternarylogic_epi64(values[i], sign, zero, 0xEA);
      to[2 * h + i] = _mm512_sub_ps(_mm512_castsi512_ps(values[i]), _mm512_castsi512_ps(signed_zero));
    }
  }
}
ENGRAM_INLINE void read_second_moments(const uint8_t* codes, const float* scale, Floats* to) {
  const CompactConstants& c = compact_constants();
  const __m512i from = before_unpacking(codes), none = _mm512_setzero_si512();
  const __m512i zero16 = _mm512_add_epi16(each16(upper_half(scale)), each16(c.second_shift16));
  const __m512 zero =
      _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(_mm512_set1_ps(*scale)), each32(c.second_shift)));
  const __m512i bytes[2] = {_mm512_unpacklo_epi8(from, none), _mm512_unpackhi_epi8(from, none)};
  for (int h = 0; h < 2; ++h) {
    const __m512i upper = _mm512_add_epi16(_mm512_slli_epi16(bytes[h], kDrop - 16), zero16);
    to[2 * h] = _mm512_sub_ps(_mm512_castsi512_ps(_mm512_unpacklo_epi16(none, upper)), zero);
    to[2 * h + 1] = _mm512_sub_ps(_mm512_castsi512_ps(_mm512_unpackhi_epi16(none, upper)), zero);
  }
}
struct BlockScales {
  __m512i scales;  // the first moment's in the lower half, the second's in the upper
  Floats first_reciprocal, second_reciprocal;
};
ENGRAM_INLINE bool make_scales(Lanes first, Lanes second, BlockScales* to) {
  const CompactConstants& c = compact_constants();
  const auto a = reinterpret_cast<__m512i>(first), b = reinterpret_cast<__m512i>(second);
  __m512i most = _mm512_max_epu32(_mm512_shuffle_i64x2(a, b, 0x44), _mm512_shuffle_i64x2(a, b, 0xEE));
  most = _mm512_max_epu32(most, _mm512_shuffle_i64x2(most, most, 0xB1));
  most = _mm512_max_epu32(most, _mm512_shuffle_epi32(most, static_cast<_MM_PERM_ENUM>(0x4E)));
  most = _mm512_max_epu32(most, _mm512_shuffle_epi32(most, static_cast<_MM_PERM_ENUM>(0xB1)));
  const __m512i carries = _mm512_mask_blend_epi32(0xFF00, each32(c.first_carry), each32(c.second_carry));
  const __m512i scales = _mm512_and_si512(_mm512_add_epi32(most, carries), each32(c.exponent));
  to->scales = scales;
  const __m512i reciprocals = _mm512_maskz_sub_epi32(_mm512_test_epi32_mask(scales, scales), each32(c.twice), scales);
  to->first_reciprocal = _mm512_castsi512_ps(_mm512_shuffle_i64x2(reciprocals, reciprocals, 0x44));
  to->second_reciprocal = _mm512_castsi512_ps(_mm512_shuffle_i64x2(reciprocals, reciprocals, 0xEE));
  return _mm512_cmpge_epu32_mask(scales, each32(c.limit)) == 0;
}
ENGRAM_INLINE void write_scales(const BlockScales& scales, float* first, float* second) {
  _mm_store_ss(first, _mm512_castps512_ps128(_mm512_castsi512_ps(scales.scales)));
  _mm_store_ss(second,
               _mm512_castps512_ps128(_mm512_castsi512_ps(_mm512_shuffle_i64x2(scales.scales, scales.scales, 0xEE))));
}
// Bits kDrop to kDrop + 7 of 64 sums.
ENGRAM_INLINE __m512i code_bytes(const __m512i* sums) {
  const CompactConstants& c = compact_constants();
  const __m512i places = each16(c.places);
  __m512i bytes = _mm512_multishift_epi64_epi8(places, sums[0]);
  for (int g = 1; g < 4; ++g)  // two bytes of every word of 64 bits
    bytes = _mm512_ternarylogic_epi64(_mm512_set1_epi64(static_cast<int64_t>(c.pairs[g - 1])),
                                      _mm512_multishift_epi64_epi8(places, sums[g]), bytes, 0xCA);
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 4, 8,  12, 16, 20, 24, 28, 1, 5, 9,  13, 17, 21, 25, 29,
                                                      2, 6, 10, 14, 18, 22, 26, 30, 3, 7, 11, 15, 19, 23, 27, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), bytes);
}
ENGRAM_INLINE void write_first_codes(const Floats* x, const BlockScales& scales, const Lanes* noise, int8_t* to) {
  const CompactConstants& c = compact_constants();
  __m512i sums[4];
  for (int g = 0; g < 4; ++g) {
    const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(x[g]), each32(c.magnitude));
    const __m512 value = _mm512_fmadd_ps(_mm512_castsi512_ps(magnitude), scales.first_reciprocal,
                                         _mm512_castsi512_ps(each32(c.first_zero)));
    sums[g] = _mm512_add_epi32(_mm512_castps_si512(value), reinterpret_cast<__m512i>(noise[g]));
    // 128 - code, and no borrow by what is cut off
    sums[g] =
        _mm512_mask_sub_epi32(sums[g], _mm512_movepi32_mask(_mm512_castps_si512(x[g])), each32(c.negative), sums[g]);
  }
  _mm512_storeu_si512(to, _mm512_xor_si512(code_bytes(sums), _mm512_set1_epi8(static_cast<char>(c.flip))));
}
ENGRAM_INLINE void write_second_codes(const Floats* x, const BlockScales& scales, const Lanes* noise, uint8_t* to) {
  static_assert((kSecondBits >> kDrop & 0xFF) == 0, "the bits of a sum are its code's");
  const CompactConstants& c = compact_constants();
  __m512i sums[4];
  for (int g = 0; g < 4; ++g) {
    const __m512 value = _mm512_fmadd_ps(x[g], scales.second_reciprocal, _mm512_castsi512_ps(each32(c.second_zero)));
    sums[g] = _mm512_add_epi32(_mm512_castps_si512(value), reinterpret_cast<__m512i>(noise[g]));
  }
  _mm512_storeu_si512(to, _mm512_max_epu8(code_bytes(sums), _mm512_set1_epi8(static_cast<char>(c.one))));
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
