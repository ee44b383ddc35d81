// The few vector primitives the kernels are written in, per instruction set. ENGRAM_ISA names the namespace of this
// compilation: scalar, avx2, avx512 or neon.
//
//   Bits    a vector of kBitLanes 64-bit words. Population counts go through two stages, since AVX2 and NEON count
//           within bytes: `count` gives partial counts, `add_count` accumulates them at most kCountSteps times before
//           `widen` folds them into 64-bit lanes.
//           `count_where` counts within a gate, a word of which `split_gate` has split into kGateParts words.
//           For random numbers: `multiply_low` multiplies the low halves of lanes, `shift_down` halves move down,
//           `join_low` makes lanes of two low halves, `interleave_first/second` take even and odd lanes of a, b in
//           turn.
//           `store_low` stores the low halves of lanes one after the other.
//   Floats  a vector of kLanes floats. A Mask selects lanes by packed bits: `mask_of(bits32(b), group)` those of the
//           group-th vector of 32 floats by the 32 bits b.
//           Where a register holds a table of the 2^kTableSigns sums of kTableSigns signed terms (ENGRAM_HAS_LOOK_UP),
//           `look_up` takes for each lane the entry that the low bits of its index name, and `next_indices` moves the
//           bits above those down; `flip_where` changes the sign of the lanes whose bit is 1. Elsewhere `add_where`
//           adds in selected lanes only: sum_k s_k a_k = 2 * sum_{k: bit 1} a_k - sum_k a_k.
//           `add_product` may or may not round the product: use it only where that is exact.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/bits.h"

#if defined(ENGRAM_ISA_AVX2) || defined(ENGRAM_ISA_AVX512)
#include <immintrin.h>
#elif defined(ENGRAM_ISA_NEON)
#include <arm_neon.h>
#endif

#define ENGRAM_INLINE static inline __attribute__((always_inline))

namespace engram::cpu::ENGRAM_ISA {

template <typename T>
ENGRAM_INLINE constexpr T smaller(T a, T b) {
  return b < a ? b : a;
}

ENGRAM_INLINE int64_t scalar_popcount(uint64_t v) {
  v -= (v >> 1) & 0x5555555555555555u;
  v = (v & 0x3333333333333333u) + ((v >> 2) & 0x3333333333333333u);
  v = (v + (v >> 4)) & 0x0F0F0F0F0F0F0F0Fu;
  return static_cast<int64_t>((v * 0x0101010101010101u) >> 56);
}

#if defined(ENGRAM_ISA_AVX512)

constexpr int kVectorBytes = 64;

using Bits = __m512i;
constexpr int kBitLanes = 8;
constexpr int64_t kCountSteps = int64_t{1} << 32;
constexpr int kTileRows = 8;  // samples in a register tile of binary_matmul; 8 x 2 accumulators of 32 registers
// With a gate fewer, for their distances need registers too: all are made before the first is counted. In turns, the
// operation of three operands would leave a quarter of Zen 4's slots idle.
#define ENGRAM_GATE_IN_STAGES
constexpr int kGatedTileRows = 6;

ENGRAM_INLINE Bits bits_zero() { return _mm512_setzero_si512(); }
ENGRAM_INLINE Bits bits_load(const uint64_t* p) { return _mm512_loadu_si512(p); }
ENGRAM_INLINE void bits_store(uint64_t* p, Bits v) { _mm512_storeu_si512(p, v); }
ENGRAM_INLINE Bits bits_all(uint64_t v) { return _mm512_set1_epi64(static_cast<int64_t>(v)); }
ENGRAM_INLINE Bits differ(Bits a, Bits b) { return _mm512_xor_si512(a, b); }
ENGRAM_INLINE Bits differ_within(Bits a, Bits b, Bits g) { return _mm512_ternarylogic_epi64(a, b, g, 0x28); }
ENGRAM_INLINE Bits count(Bits v) { return _mm512_popcnt_epi64(v); }
constexpr int kGateParts = 1;
ENGRAM_INLINE void split_gate(uint64_t g, uint64_t* parts) { *parts = g; }
// Keeps the compiler from moving operations on v past others that are ordered so.
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

#elif defined(ENGRAM_ISA_AVX2)

constexpr int kVectorBytes = 32;

using Bits = __m256i;
constexpr int kBitLanes = 4;
constexpr int64_t kCountSteps = 31;  // a byte holds at most 31 counts of up to 8
constexpr int kTileRows = 4;
constexpr int kGatedTileRows = 4;

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

#elif defined(ENGRAM_ISA_NEON)

constexpr int kVectorBytes = 16;

using Bits = uint64x2_t;
constexpr int kBitLanes = 2;
constexpr int64_t kCountSteps = 31;
constexpr int kTileRows = 8;
constexpr int kGatedTileRows = 8;

ENGRAM_INLINE Bits bits_zero() { return vdupq_n_u64(0); }
ENGRAM_INLINE Bits bits_load(const uint64_t* p) { return vld1q_u64(p); }
ENGRAM_INLINE void bits_store(uint64_t* p, Bits v) { vst1q_u64(p, v); }
ENGRAM_INLINE Bits bits_all(uint64_t v) { return vdupq_n_u64(v); }
ENGRAM_INLINE Bits differ(Bits a, Bits b) { return veorq_u64(a, b); }
ENGRAM_INLINE Bits differ_within(Bits a, Bits b, Bits g) { return vandq_u64(veorq_u64(a, b), g); }
ENGRAM_INLINE Bits count(Bits v) { return vreinterpretq_u64_u8(vcntq_u8(vreinterpretq_u8_u64(v))); }
constexpr int kGateParts = 1;
ENGRAM_INLINE void split_gate(uint64_t g, uint64_t* parts) { *parts = g; }
ENGRAM_INLINE Bits count_where(Bits a, Bits b, const uint64_t* parts) {
  return count(differ_within(a, b, bits_all(*parts)));
}
ENGRAM_INLINE Bits add_count(Bits a, Bits b) {
  return vreinterpretq_u64_u8(vaddq_u8(vreinterpretq_u8_u64(a), vreinterpretq_u8_u64(b)));
}
ENGRAM_INLINE Bits widen(Bits v) { return vpaddlq_u32(vpaddlq_u16(vpaddlq_u8(vreinterpretq_u8_u64(v)))); }
ENGRAM_INLINE Bits add_wide(Bits a, Bits b) { return vaddq_u64(a, b); }
ENGRAM_INLINE int64_t bits_total(Bits v) { return static_cast<int64_t>(vaddvq_u64(v)); }
ENGRAM_INLINE Bits multiply_low(Bits a, Bits b) { return vmull_u32(vmovn_u64(a), vmovn_u64(b)); }
ENGRAM_INLINE Bits shift_down(Bits v) { return vshrq_n_u64(v, 32); }
ENGRAM_INLINE Bits join_low(Bits low, Bits high) { return vsliq_n_u64(low, high, 32); }
ENGRAM_INLINE void store_low(uint32_t* p, Bits v) { vst1_u32(p, vmovn_u64(v)); }
ENGRAM_INLINE Bits interleave_first(Bits a, Bits b) { return vzip1q_u64(a, b); }
ENGRAM_INLINE Bits interleave_second(Bits a, Bits b) { return vzip2q_u64(a, b); }

using Floats = float32x4_t;
using Mask = uint32x4_t;
constexpr int kLanes = 4;

ENGRAM_INLINE Floats zero() { return vdupq_n_f32(0); }
ENGRAM_INLINE Floats load(const float* p) { return vld1q_f32(p); }
ENGRAM_INLINE void store(float* p, Floats v) { vst1q_f32(p, v); }
ENGRAM_INLINE Floats all(float v) { return vdupq_n_f32(v); }
ENGRAM_INLINE Floats add(Floats a, Floats b) { return vaddq_f32(a, b); }
ENGRAM_INLINE Floats add_product(Floats acc, Floats a, Floats b) { return vfmaq_f32(acc, a, b); }
using Bits32 = uint32x4_t;
ENGRAM_INLINE Bits32 bits32(uint32_t bits) { return vdupq_n_u32(bits); }
ENGRAM_INLINE Mask mask_of(Bits32 bits, int group) {
  const uint32_t lanes[4] = {1u << 4 * group, 2u << 4 * group, 4u << 4 * group, 8u << 4 * group};
  return vtstq_u32(bits, vld1q_u32(lanes));
}
ENGRAM_INLINE Floats keep_where(Mask m, Floats v) {
  return vreinterpretq_f32_u32(vandq_u32(m, vreinterpretq_u32_f32(v)));
}
ENGRAM_INLINE Floats add_where(Floats acc, Mask m, Floats v) { return vaddq_f32(acc, keep_where(m, v)); }
ENGRAM_INLINE float total(Floats v) { return vaddvq_f32(v); }

// Lane masks to four bits.
ENGRAM_INLINE uint64_t nibble_from(uint32x4_t mask) {
  const uint32_t lanes[4] = {1, 2, 4, 8};
  return vaddvq_u32(vandq_u32(mask, vld1q_u32(lanes)));
}
ENGRAM_INLINE uint64_t signs_of_64(const float* x, bool& nan) {
  uint64_t word = 0;
  uint32x4_t ordered = vdupq_n_u32(~0u);
  for (int g = 0; g < 16; ++g) {
    const float32x4_t v = vld1q_f32(x + 4 * g);
    word |= nibble_from(vcgezq_f32(v)) << (4 * g);
    ordered = vandq_u32(ordered, vceqq_f32(v, v));
  }
  nan |= vminvq_u32(ordered) == 0;
  return word;
}
ENGRAM_INLINE uint64_t signs_of_64(const uint16_t* x, uint16_t infinity, bool& nan) {
  const uint16_t lanes[8] = {1, 2, 4, 8, 16, 32, 64, 128};
  uint64_t word = 0;
  uint16x8_t unordered = vdupq_n_u16(0);
  for (int g = 0; g < 8; ++g) {
    const uint16x8_t v = vld1q_u16(x + 8 * g);
    const uint16x8_t positive = vcleq_u16(v, vdupq_n_u16(0x8000));  // every positive value, and -0
    word |= static_cast<uint64_t>(vaddvq_u16(vandq_u16(positive, vld1q_u16(lanes)))) << (8 * g);
    unordered = vorrq_u16(unordered, vcgtq_u16(vandq_u16(v, vdupq_n_u16(0x7FFF)), vdupq_n_u16(infinity)));
  }
  nan |= vmaxvq_u16(unordered) != 0;
  return word;
}
ENGRAM_INLINE uint64_t window_of_64(const float* x, float width) {
  uint64_t word = 0;
  for (int g = 0; g < 16; ++g) word |= nibble_from(vcaleq_f32(vld1q_f32(x + 4 * g), vdupq_n_f32(width))) << (4 * g);
  return word;
}

#else  // scalar

constexpr int kVectorBytes = 16;

using Bits = uint64_t;
constexpr int kBitLanes = 1;
constexpr int64_t kCountSteps = int64_t{1} << 32;
constexpr int kTileRows = 4;
constexpr int kGatedTileRows = 4;

ENGRAM_INLINE Bits bits_zero() { return 0; }
ENGRAM_INLINE Bits bits_load(const uint64_t* p) { return *p; }
ENGRAM_INLINE void bits_store(uint64_t* p, Bits v) { *p = v; }
ENGRAM_INLINE Bits bits_all(uint64_t v) { return v; }
ENGRAM_INLINE Bits differ(Bits a, Bits b) { return a ^ b; }
ENGRAM_INLINE Bits differ_within(Bits a, Bits b, Bits g) { return (a ^ b) & g; }
ENGRAM_INLINE Bits count(Bits v) { return static_cast<uint64_t>(scalar_popcount(v)); }
constexpr int kGateParts = 1;
ENGRAM_INLINE void split_gate(uint64_t g, uint64_t* parts) { *parts = g; }
ENGRAM_INLINE Bits count_where(Bits a, Bits b, const uint64_t* parts) {
  return count(differ_within(a, b, bits_all(*parts)));
}
ENGRAM_INLINE Bits add_count(Bits a, Bits b) { return a + b; }
ENGRAM_INLINE Bits widen(Bits v) { return v; }
ENGRAM_INLINE Bits add_wide(Bits a, Bits b) { return a + b; }
ENGRAM_INLINE int64_t bits_total(Bits v) { return static_cast<int64_t>(v); }
ENGRAM_INLINE Bits multiply_low(Bits a, Bits b) { return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu); }
ENGRAM_INLINE Bits shift_down(Bits v) { return v >> 32; }
ENGRAM_INLINE Bits join_low(Bits low, Bits high) { return (low & 0xFFFFFFFFu) | high << 32; }
ENGRAM_INLINE void store_low(uint32_t* p, Bits v) { *p = static_cast<uint32_t>(v); }
ENGRAM_INLINE Bits interleave_first(Bits a, Bits) { return a; }
ENGRAM_INLINE Bits interleave_second(Bits, Bits b) { return b; }

// Four floats in the compiler's own vector type: plain C++ that any target can lower.
using Floats = float __attribute__((vector_size(16), aligned(16)));
using Mask = int32_t __attribute__((vector_size(16), aligned(16)));
constexpr int kLanes = 4;

ENGRAM_INLINE Floats zero() { return Floats{0, 0, 0, 0}; }
ENGRAM_INLINE Floats load(const float* p) {
  Floats v;
  memcpy(&v, p, sizeof v);
  return v;
}
ENGRAM_INLINE void store(float* p, Floats v) { memcpy(p, &v, sizeof v); }
ENGRAM_INLINE Floats all(float v) { return Floats{v, v, v, v}; }
ENGRAM_INLINE Floats add(Floats a, Floats b) { return a + b; }
ENGRAM_INLINE Floats add_product(Floats acc, Floats a, Floats b) { return acc + a * b; }
using Bits32 = uint32_t;
ENGRAM_INLINE Bits32 bits32(uint32_t bits) { return bits; }
ENGRAM_INLINE Mask mask_of(Bits32 bits, int group) {
  const int32_t nibble = static_cast<int32_t>(bits >> (4 * group) & 0xF);
  return (Mask{nibble, nibble, nibble, nibble} & Mask{1, 2, 4, 8}) != 0;
}
ENGRAM_INLINE Floats keep_where(Mask m, Floats v) { return reinterpret_cast<Floats>(reinterpret_cast<Mask>(v) & m); }
ENGRAM_INLINE Floats add_where(Floats acc, Mask m, Floats v) { return acc + keep_where(m, v); }
ENGRAM_INLINE float total(Floats v) { return (v[0] + v[2]) + (v[1] + v[3]); }

ENGRAM_INLINE uint64_t signs_of_64(const float* x, bool& nan) {
  uint64_t word = 0;
  bool unordered = false;
  for (int i = 0; i < 64; ++i) {
    word |= static_cast<uint64_t>(x[i] >= 0.0f) << i;
    unordered |= x[i] != x[i];
  }
  nan |= unordered;
  return word;
}
ENGRAM_INLINE uint64_t signs_of_64(const uint16_t* x, uint16_t infinity, bool& nan) {
  uint64_t word = 0;
  bool unordered = false;
  for (int i = 0; i < 64; ++i) {
    word |= static_cast<uint64_t>(x[i] <= 0x8000) << i;  // every positive value, and -0
    unordered |= (x[i] & 0x7FFF) > infinity;
  }
  nan |= unordered;
  return word;
}
ENGRAM_INLINE uint64_t window_of_64(const float* x, float width) {
  uint64_t word = 0;
  for (int i = 0; i < 64; ++i) word |= static_cast<uint64_t>(x[i] <= width && x[i] >= -width) << i;
  return word;
}

#endif

// Numbers of 4 bytes: out[j * out_stride + i] = in[i * in_stride + j] for i, j < kTransposeSize.
#if defined(ENGRAM_ISA_AVX2) || defined(ENGRAM_ISA_AVX512)
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
#else
constexpr int kTransposeSize = 4;
template <typename T>
ENGRAM_INLINE void transpose_block(const T* in, int64_t in_stride, T* out, int64_t out_stride) {
  for (int j = 0; j < 4; ++j)
    for (int i = 0; i < 4; ++i) out[j * out_stride + i] = in[i * in_stride + j];
}
#endif

// 64-bit words: out[j * out_stride + i] = in[i * in_stride + j] for i, j < kBitLanes.
ENGRAM_INLINE void transpose_words(const uint64_t* in, int64_t in_stride, uint64_t* out, int64_t out_stride) {
#if defined(ENGRAM_ISA_AVX512)
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
#else
  for (int i = 0; i < kBitLanes; ++i)
    for (int j = 0; j < kBitLanes; ++j) out[j * out_stride + i] = in[i * in_stride + j];
#endif
}

// out[j * out_stride + i] = in[i * in_stride + j] for i < rows, j < columns. Columns in the outer loop: few rows of
// `out`, which often lie a power of two apart and share a set of the cache, are written at a time.
template <typename T>
ENGRAM_INLINE void write_transposed(const T* in, int64_t in_stride, int64_t rows, int64_t columns, T* out,
                                    int64_t out_stride) {
  int64_t j = 0;
  for (; j + kTransposeSize <= columns; j += kTransposeSize) {
    int64_t i = 0;
    for (; i + kTransposeSize <= rows; i += kTransposeSize)
      transpose_block(in + i * in_stride + j, in_stride, out + j * out_stride + i, out_stride);
    for (; i < rows; ++i)
      for (int64_t column = j; column < j + kTransposeSize; ++column)
        out[column * out_stride + i] = in[i * in_stride + column];
  }
  for (; j < columns; ++j)
    for (int64_t i = 0; i < rows; ++i) out[j * out_stride + i] = in[i * in_stride + j];
}

// Transposes 64 x 64 blocks of bits in place, a block in each lane: bit j of a[i] becomes bit i of a[j] (Hacker's
// Delight, 7-3).
using Words = uint64_t __attribute__((vector_size(kVectorBytes), aligned(kVectorBytes)));
constexpr int kWordLanes = kVectorBytes / 8;
ENGRAM_INLINE void transpose_64x64(Words* a) {
  uint64_t mask = 0x00000000FFFFFFFFu;
#pragma GCC unroll 6
  for (int j = 32; j != 0; j >>= 1, mask ^= mask << j) {
    for (int i = 0; i < 64; i = ((i | j) + 1) & ~j) {
      const Words t = ((a[i] >> j) ^ a[i | j]) & mask;
      a[i] ^= t << j;
      a[i | j] ^= t;
    }
  }
}

}  // namespace engram::cpu::ENGRAM_ISA
