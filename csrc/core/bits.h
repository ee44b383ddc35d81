// The packed format, defined once; engram_kernels/reference.py mirrors it.
//
//   bit 1 = +1, bit 0 = -1 (in a gate: 1 = recruited), least significant bit first, along the last dimension
//   64-bit words; a row is padded with 0 bits to a multiple of 128 bits, so that every row starts 16-byte aligned
//
// A gate's padding is 0 as well, which is why no kernel needs a special case for the tail of a gated row.
// Functions are `static` on purpose: each kernel file is compiled once per instruction set, and a shared inline
// definition could be merged into a copy that the machine cannot run.
#pragma once

#include <cstdint>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "engram_kernels addresses packed bits by byte and needs a little-endian machine"
#endif

// What CPU and CUDA kernels share.
#if defined(__CUDACC__)
#define ENGRAM_FUNCTION static __host__ __device__ __forceinline__
#else
#define ENGRAM_FUNCTION static inline
#endif

namespace engram {

constexpr int64_t kWordBits = 64;
constexpr int64_t kRowBits = 128;

// Of signs in groups, which subsets of half as many numbers are looked up by; rows are padded to kGroupedRows.
constexpr int64_t kGroup = 12;
constexpr int64_t kGroupedRows = 32;

// Where the bit of number i of a group lies: each half has a byte.
ENGRAM_FUNCTION constexpr int64_t place_in_group(int64_t i) { return i < kGroup / 2 ? i : i - kGroup / 2 + 8; }

// Number of 64-bit words in a packed row of k units.
ENGRAM_FUNCTION constexpr int64_t words_for(int64_t k) {
  return (k + kRowBits - 1) / kRowBits * (kRowBits / kWordBits);
}

ENGRAM_FUNCTION constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Mask of the bits of word `word` that belong to a row of k units.
ENGRAM_FUNCTION constexpr uint64_t valid_bits(int64_t word, int64_t k) {
  const int64_t left = k - word * kWordBits;
  return left >= kWordBits ? ~uint64_t{0} : left <= 0 ? 0 : (uint64_t{1} << left) - 1;
}

}  // namespace engram
