// NEON of 64-bit ARM.
#pragma once

#include <arm_neon.h>

#include "cpu/simd/common.h"

namespace engram::cpu::ENGRAM_ISA {

constexpr int kVectorBytes = 16;

using Bits = uint64x2_t;
constexpr int kBitLanes = 2;
constexpr int64_t kCountSteps = 31;
constexpr int kTileRows = 8;
constexpr int kGatedTileRows = 8;
constexpr bool kGateInStages = false;
constexpr int64_t kDotSamples = 3;
constexpr int kLookUpColumns = 4;
constexpr int kOuterRows = 8;
constexpr int kDrawVectors = 2;

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
ENGRAM_INLINE void in_order(Bits& v) { asm volatile("" : "+w"(v)); }
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

using Lanes = uint32_t __attribute__((vector_size(16), aligned(16)));
ENGRAM_INLINE Floats square_root(Floats v) { return vsqrtq_f32(v); }
ENGRAM_INLINE Floats within(Floats v, Floats bound) { return vmaxq_f32(vminq_f32(v, bound), vnegq_f32(bound)); }
ENGRAM_INLINE Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }
ENGRAM_INLINE Lanes smaller_of(Lanes a, Lanes b) { return a < b ? a : b; }
ENGRAM_INLINE uint32_t largest_lane(Lanes v) { return vmaxvq_u32(reinterpret_cast<uint32x4_t>(v)); }
ENGRAM_INLINE bool any_at_least(Lanes v, uint32_t limit) { return largest_lane(v) >= limit; }
ENGRAM_INLINE bool any_nan(const Floats* v) {
  uint32x4_t ordered = vdupq_n_u32(~0u);
  for (int g = 0; g < 16; ++g) ordered = vandq_u32(ordered, vceqq_f32(v[g], v[g]));
  return vminvq_u32(ordered) == 0;
}
ENGRAM_INLINE uint64_t signs_of(const Floats* x) {
  uint64_t word = 0;
  for (int g = 0; g < 16; ++g) word |= nibble_from(vcgezq_f32(x[g])) << (4 * g);
  return word;
}
ENGRAM_INLINE uint64_t signs_of(const uint16_t* x) {
  bool nan = false;
  return signs_of_64(x, 0x7F80, nan);
}

template <typename T>
ENGRAM_INLINE Lanes widened(const T* from) {
  return widened_plainly<Lanes>(from);
}
template <typename T>
ENGRAM_INLINE void narrow(const Lanes* from, T* to) {
  narrow_plainly(from, to);
}

constexpr int kTransposeSize = 4;
template <typename T>
ENGRAM_INLINE void transpose_block(const T* in, int64_t in_stride, T* out, int64_t out_stride) {
  transpose_plainly<kTransposeSize>(in, in_stride, out, out_stride);
}

ENGRAM_INLINE void transpose_words(const uint64_t* in, int64_t in_stride, uint64_t* out, int64_t out_stride) {
  transpose_plainly<kBitLanes>(in, in_stride, out, out_stride);
}

template <typename Threshold>
ENGRAM_INLINE uint64_t at_least_64(const int32_t* y, const Threshold& threshold) {
  return at_least_plainly(y, 64, threshold);
}

}  // namespace engram::cpu::ENGRAM_ISA
