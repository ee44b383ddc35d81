// What the instruction sets' files are written with.
#pragma once

#include <cstdint>

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

// out[j * out_stride + i] = in[i * in_stride + j] for i, j < kSize.
template <int kSize, typename T>
ENGRAM_INLINE void transpose_plainly(const T* in, int64_t in_stride, T* out, int64_t out_stride) {
  for (int i = 0; i < kSize; ++i)
    for (int j = 0; j < kSize; ++j) out[j * out_stride + i] = in[i * in_stride + j];
}

}  // namespace engram::cpu::ENGRAM_ISA
