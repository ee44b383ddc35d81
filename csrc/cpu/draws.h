// The draws of core/philox.h for a group of units, vectorised.
#pragma once

#include "core/philox.h"
#include "cpu/simd.h"

namespace engram::cpu::ENGRAM_ISA {

constexpr int64_t kDrawGroup = 64;  // units drawn together: 16 Philox counters

// draws[i] = 32 random bits of unit first + i of a row; first is a multiple of 4. Structure of arrays, so that the
// compiler vectorises it.
ENGRAM_INLINE void draw_group(uint64_t seed, uint32_t offset, uint64_t row, int64_t first, uint32_t* draws) {
  constexpr int kCounters = kDrawGroup / 4;
  // 32-bit numbers in 64-bit lanes: a product needs no widening
  uint64_t c0[kCounters], c1[kCounters], c2[kCounters], c3[kCounters];
  constexpr uint64_t kLow = 0xFFFFFFFFu;
  for (int i = 0; i < kCounters; ++i) {
    c0[i] = static_cast<uint64_t>(first / 4 + i) & kLow;
    c1[i] = row & kLow;
    c2[i] = row >> 32;
    c3[i] = offset;
  }
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
#pragma GCC unroll 1  // unrolled it would not be vectorised
    for (int i = 0; i < kCounters; ++i) {
      const uint64_t p0 = kPhiloxM0 * (c0[i] & kLow), p1 = kPhiloxM1 * (c2[i] & kLow);
      c0[i] = (p1 >> 32) ^ c1[i] ^ key0;
      c1[i] = p1 & kLow;
      c2[i] = (p0 >> 32) ^ c3[i] ^ key1;
      c3[i] = p0 & kLow;
    }
    key0 += kPhiloxW0;
    key1 += kPhiloxW1;
  }
  for (int i = 0; i < kCounters; ++i) {
    draws[4 * i] = static_cast<uint32_t>(c0[i]);
    draws[4 * i + 1] = static_cast<uint32_t>(c1[i]);
    draws[4 * i + 2] = static_cast<uint32_t>(c2[i]);
    draws[4 * i + 3] = static_cast<uint32_t>(c3[i]);
  }
}

}  // namespace engram::cpu::ENGRAM_ISA
