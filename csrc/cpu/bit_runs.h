// Runs of packed bits that begin anywhere.
#pragma once

#include "cpu/simd.h"

namespace engram::cpu::ENGRAM_ISA {

// `count` bits, 1 to 64, from bit `at` on.
ENGRAM_INLINE uint64_t bits_at(const uint64_t* bits, int64_t at, int64_t count) {
  const int64_t word = at / kWordBits, shift = at % kWordBits;
  uint64_t value = bits[word] >> shift;
  if (shift + count > kWordBits) value |= bits[word + 1] << (kWordBits - shift);
  return value & valid_bits(0, count);
}

// Sets those that are 1.
ENGRAM_INLINE void put_bits(uint64_t* bits, int64_t at, int64_t count, uint64_t value) {
  const int64_t word = at / kWordBits, shift = at % kWordBits;
  bits[word] |= value << shift;
  if (shift + count > kWordBits) bits[word + 1] |= value >> (kWordBits - shift);
}

}  // namespace engram::cpu::ENGRAM_ISA
