// The few vector primitives the kernels are written in. ENGRAM_ISA names the instruction set of this compilation: its
// file in cpu/simd, which has all that follows, and its namespace.
//
//   Bits    a vector of kBitLanes 64-bit words. Population counts go through two stages, since AVX2 and NEON count
//           within bytes: `count` gives partial counts, `add_count` accumulates them at most kCountSteps times before
//           `widen` folds them into 64-bit lanes.
//           `count_where` counts within a gate, a word of which `split_gate` has split into kGateParts words.
//           `in_order` keeps the compiler from moving operations on v past others that are ordered so.
//           For random numbers: `multiply_low` multiplies the low halves of lanes, `shift_down` halves move down,
//           `join_low` makes lanes of two low halves, `interleave_first/second` take even and odd lanes of a, b in
//           turn.
//           `store_low` stores the low halves of lanes one after the other.
//           `transpose_words` transposes kBitLanes x kBitLanes words, as transpose_plainly does.
//   Floats  a vector of kLanes floats. A Mask selects lanes by packed bits: `mask_of(bits32(b), group)` those of the
//           group-th vector of 32 floats by the 32 bits b.
//           Where a register holds a table of the 2^kTableSigns sums of kTableSigns signed terms (ENGRAM_HAS_LOOK_UP),
//           `look_up` takes for each lane the entry that the low bits of its index name, and `next_indices` moves the
//           bits above those down; `flip_where` changes the sign of the lanes whose bit is 1. Elsewhere `add_where`
//           adds in selected lanes only: sum_k s_k a_k = 2 * sum_{k: bit 1} a_k - sum_k a_k.
//           `add_product` may or may not round the product, so that instruction sets agree only where it is exact.
//           `transpose_block` transposes kTransposeSize x kTransposeSize numbers of 4 bytes.
//   Shorts  where registers hold tables of 64 sums (ENGRAM_HAS_SUBSET_LOOK_UP): a vector of kGroupedRows integers of
//           16 bits. `read_six_numbers` splits 12 bytes, `subset_sums` tabulates the sums of all subsets of 6 of them,
//           and `look_up_subset` takes for each integer the entry that its 6 low bits name; `shorts_high_bytes` moves
//           high bytes down; `add_twice` makes (y, or 0) + 2 sums - less. `at_least_64` compares 64 integers of 32
//           bits.
//   Lanes   the bits of Floats, unsigned integers of 32 bits with the operators of C++. `square_root` is IEEE's;
//           `within` clips numbers that are no NaN to -bound and bound. Of a word, 64 numbers in kWordVectors vectors:
//           `any_nan`, `signs_of`.
//           `widened` loads as many short integers as there are lanes, `narrow` stores the low parts of 64 lanes.
//   Compact the numbers of core/compact.h, 64 at a time. They are below, but where an instruction set has its own
//           (ENGRAM_HAS_COMPACT).
//   Sizes   kTileRows: samples in a register tile of binary_matmul, and with a gate kGatedTileRows, whose distances
//           kGateInStages makes all before the first is counted. kDotSamples: samples up to which its dot form is the
//           faster. kLookUpColumns: accumulators of sign_product, enough to hide the latency of an addition.
//           kOuterRows: outputs in a register tile of real_weight_grad, by kOuterVectors vectors of units.
//           kDrawVectors: vectors of Philox counters at once, since the rounds of one wait for each other.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/bits.h"
#include "core/compact.h"

#define ENGRAM_TEXT_(x) #x
#define ENGRAM_TEXT(x) ENGRAM_TEXT_(x)
// clang-format off: no spaces in the name of a file
#include ENGRAM_TEXT(cpu/simd/ENGRAM_ISA.h)
// clang-format on

namespace engram::cpu::ENGRAM_ISA {

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

ENGRAM_INLINE uint32_t bits_of(float x) { return bits_from_float(x); }
ENGRAM_INLINE float floats_of(uint32_t bits) { return float_from_bits(bits); }
ENGRAM_INLINE Lanes bits_of(Floats v) { return reinterpret_cast<Lanes>(v); }
ENGRAM_INLINE Floats floats_of(Lanes v) { return reinterpret_cast<Floats>(v); }

constexpr int kWordVectors = 64 / kLanes;

#if !defined(ENGRAM_HAS_COMPACT)
ENGRAM_INLINE void read_bfloat16(const uint16_t* from, Floats* to) {
  for (int i = 0; i < kWordVectors; ++i) to[i] = floats_of(widened(from + kLanes * i) << 16);
}
ENGRAM_INLINE void write_bfloat16(const Lanes* sums, uint16_t* to) {
  Lanes upper[kWordVectors];
  for (int i = 0; i < kWordVectors; ++i) upper[i] = sums[i] >> 16;
  narrow(upper, to);
}
// What a code is held as and the scale, a power of two, are multiplied by adding exponents. The bits of code 0:
ENGRAM_INLINE uint32_t scaled_zero(float scale, uint32_t zero_bits) {
  return bits_from_float(scale) + zero_bits - (uint32_t{127} << 23);
}
ENGRAM_INLINE void read_first_moments(const int8_t* codes, const float* scale, Floats* to) {
  const uint32_t zero_bits = scaled_zero(*scale, kFirstBits);
  for (int i = 0; i < kWordVectors; ++i) {
    const Lanes code = widened(codes + kLanes * i), sign = code & 0x80000000u;
    const Lanes negative = -(code >> 31), magnitude = (code ^ negative) - negative;
    to[i] = floats_of(((magnitude << kDrop) + zero_bits) | sign) - floats_of(sign | zero_bits);
  }
}
ENGRAM_INLINE void read_second_moments(const uint8_t* codes, const float* scale, Floats* to) {
  const uint32_t zero_bits = scaled_zero(*scale, kSecondBits);
  for (int i = 0; i < kWordVectors; ++i)
    to[i] = floats_of((widened(codes + kLanes * i) << kDrop) + zero_bits) - all(float_from_bits(zero_bits));
}
// The scales of a block's moments, from the magnitudes in a vector of each. False if one is at its limit, where codes
// have to be clamped.
struct BlockScales {
  float first, second;
};
ENGRAM_INLINE bool make_scales(Lanes first, Lanes second, BlockScales* to) {
  *to = {block_scale(largest_lane(first), kFirstCarry), block_scale(largest_lane(second), kSecondCarry)};
  constexpr uint32_t kLimit = uint32_t{253} << 23;
  return bits_from_float(to->first) < kLimit && bits_from_float(to->second) < kLimit;
}
ENGRAM_INLINE void write_scales(const BlockScales& scales, float* first, float* second) {
  *first = scales.first, *second = scales.second;
}
ENGRAM_INLINE void write_first_codes(const Floats* x, const BlockScales& scales, const Lanes* noise, int8_t* to) {
  const Floats by = all(reciprocal_of_scale(scales.first)), zero = all(float_from_bits(kFirstBits));
  Lanes codes[kWordVectors];
  for (int i = 0; i < kWordVectors; ++i) {
    const Lanes negative = -(bits_of(x[i]) >> 31);
    const Lanes sum = bits_of(add_product(zero, floats_of(bits_of(x[i]) & 0x7FFFFFFFu), by)) + noise[i];
    codes[i] = (((sum - kFirstBits) >> kDrop) ^ negative) - negative;
  }
  narrow(codes, to);
}
ENGRAM_INLINE void write_second_codes(const Floats* x, const BlockScales& scales, const Lanes* noise, uint8_t* to) {
  const Floats by = all(reciprocal_of_scale(scales.second)), zero = all(float_from_bits(kSecondBits));
  Lanes codes[kWordVectors];
  for (int i = 0; i < kWordVectors; ++i)
    codes[i] = larger((bits_of(add_product(zero, x[i], by)) + noise[i] - kSecondBits) >> kDrop, Lanes{} + 1u);
  narrow(codes, to);
}
#endif

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
