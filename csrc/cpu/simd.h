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
//           `add_product` may or may not round the product: use it only where that is exact.
//           `transpose_block` transposes kTransposeSize x kTransposeSize numbers of 4 bytes.
//   Shorts  where registers hold tables of 64 sums (ENGRAM_HAS_SUBSET_LOOK_UP): a vector of kGroupedRows integers of
//           16 bits. `read_six_numbers` splits 12 bytes, `subset_sums` tabulates the sums of all subsets of 6 of them,
//           and `look_up_subset` takes for each integer the entry that its 6 low bits name; `shorts_high_bytes` moves
//           high bytes down; `add_twice` makes (y, or 0) + 2 sums - less. `at_least_64` compares 64 integers of 32
//           bits.
//   Compact where registers hold 64 compact numbers (ENGRAM_HAS_COMPACT): those of core/compact.h, 64 at a time.
//   Sizes   kTileRows: samples in a register tile of binary_matmul, and with a gate kGatedTileRows, whose distances
//           kGateInStages makes all before the first is counted. kDotSamples: samples up to which its dot form is the
//           faster. kLookUpColumns: accumulators of sign_product, enough to hide the latency of an addition.
//           kDrawVectors: vectors of Philox counters at once, since the rounds of one wait for each other.
#pragma once

#include <cstdint>

#include "core/bits.h"

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
