// Plain C++, for any processor.
#pragma once

#include <cstring>

#include "cpu/simd/common.h"

namespace engram::cpu::ENGRAM_ISA {

constexpr int kVectorBytes = 16;

using Bits = uint64_t;
constexpr int kBitLanes = 1;
constexpr int64_t kCountSteps = int64_t{1} << 32;
constexpr int kTileRows = 4;
constexpr int kGatedTileRows = 4;
constexpr bool kGateInStages = false;
constexpr int64_t kDotSamples = 3;
constexpr int kLookUpColumns = 4;
constexpr int kOuterRows = 4;
constexpr int kDrawVectors = 2;

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
ENGRAM_INLINE void in_order(Bits& v) { asm volatile("" : "+r"(v)); }
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

using Lanes = uint32_t __attribute__((vector_size(16), aligned(16)));
ENGRAM_INLINE Floats square_root(Floats v) {
  return Floats{__builtin_sqrtf(v[0]), __builtin_sqrtf(v[1]), __builtin_sqrtf(v[2]), __builtin_sqrtf(v[3])};
}
ENGRAM_INLINE Floats within(Floats v, Floats bound) {
  const Floats most = v > bound ? bound : v;
  return most < -bound ? -bound : most;
}
ENGRAM_INLINE Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }
ENGRAM_INLINE Lanes smaller_of(Lanes a, Lanes b) { return a < b ? a : b; }
ENGRAM_INLINE uint32_t largest_lane(Lanes v) {
  const uint32_t a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
  return a > b ? a : b;
}
ENGRAM_INLINE bool any_at_least(Lanes v, uint32_t limit) { return largest_lane(v) >= limit; }
ENGRAM_INLINE bool any_nan(const Floats* v) {
  Mask unordered = {};
  for (int g = 0; g < 16; ++g) unordered |= v[g] != v[g];
  return (unordered[0] | unordered[1] | unordered[2] | unordered[3]) != 0;
}
ENGRAM_INLINE uint64_t signs_of(const Floats* x) {
  uint64_t word = 0;
  for (int i = 0; i < 64; ++i) word |= static_cast<uint64_t>(x[i / 4][i % 4] >= 0.0f) << i;
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
