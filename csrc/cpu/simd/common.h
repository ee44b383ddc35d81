// What the instruction sets' files are written with.
#pragma once

#include <cstdint>
#include <cstring>

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

// Bit i: y[i] >= threshold.of(i), for i < units.
template <typename Threshold>
ENGRAM_INLINE uint64_t at_least_plainly(const int32_t* y, int64_t units, const Threshold& threshold) {
  uint64_t word = 0;
  for (int64_t i = 0; i < units; ++i) word |= static_cast<uint64_t>(y[i] >= threshold.of(i)) << i;
  return word;
}

// Thresholds of integers: one for all of them, or one each.
struct OneThreshold {
  int32_t value;
  int32_t of(int64_t) const { return value; }
  OneThreshold from(int64_t) const { return *this; }
};
struct ThresholdEach {
  const int32_t* values;
  int32_t of(int64_t i) const { return values[i]; }
  ThresholdEach from(int64_t i) const { return {values + i}; }
};

// Six bytes as tables of their sums are made of: numbers 1 to 4; number 0 in the upper half; number 5 in both halves.
struct SixNumbers {
  uint32_t middle, first, last;
  int32_t sum;
};

// As many numbers as a vector of 32 bits has lanes.
template <typename Lanes, typename T>
ENGRAM_INLINE Lanes widened_plainly(const T* from) {
  typedef T Narrow __attribute__((vector_size(sizeof(T) * sizeof(Lanes) / sizeof(uint32_t))));
  Narrow v;
  memcpy(&v, from, sizeof v);
  return __builtin_convertvector(v, Lanes);
}

// The low parts of 64 numbers.
template <typename Lanes, typename T>
ENGRAM_INLINE void narrow_plainly(const Lanes* from, T* to) {
  alignas(64) uint32_t wide[64];
  memcpy(wide, from, sizeof wide);
  for (int i = 0; i < 64; ++i) to[i] = static_cast<T>(wide[i]);
}

// out[j * out_stride + i] = in[i * in_stride + j] for i, j < kSize.
template <int kSize, typename T>
ENGRAM_INLINE void transpose_plainly(const T* in, int64_t in_stride, T* out, int64_t out_stride) {
  for (int i = 0; i < kSize; ++i)
    for (int j = 0; j < kSize; ++j) out[j * out_stride + i] = in[i * in_stride + j];
}

}  // namespace engram::cpu::ENGRAM_ISA
