// The draws of core/philox.h for a group of units, vectorised.
#pragma once

#include <cstring>

#include "core/philox.h"
#include "cpu/simd.h"

namespace engram::cpu::ENGRAM_ISA {

// Units for which sample_engram draws together: enough that what waits for itself, the rounds of a counter and the
// operations of a logarithm, is done for many in turn.
constexpr int64_t kDrawGroup = 256;

// A counter a lane, its words in the low halves; what gathers in the high halves is never read.
class Draws {
 public:
  Draws(uint64_t seed, uint32_t offset) : offset_(offset) {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      key0_[round] = bits_all(key0), key1_[round] = bits_all(key1);
      key0 += kPhiloxW0, key1 += kPhiloxW1;
    }
    // even lanes take the first half of a vector's counters, odd lanes the second: interleaved at the end, they are in
    // order
    for (int lane = 0; lane < kBitLanes; ++lane)
      lanes_[lane] = static_cast<uint64_t>(lane / 2 + lane % 2 * (kBitLanes / 2));
  }

  // draws[i] = 32 random bits of unit first + i of a row, i < kUnits; first is a multiple of 4.
  template <int kUnits>
  __attribute__((always_inline)) void group(uint64_t row, int64_t first, uint32_t* draws) const {
    constexpr int kVectors = kUnits / 4 / kBitLanes;
    constexpr int kAtOnce = smaller(kVectors, kDrawVectors);
    const Bits m0 = bits_all(kPhiloxM0), m1 = bits_all(kPhiloxM1);
    uint64_t pairs[kUnits / 2];
    for (int first_vector = 0; first_vector < kVectors; first_vector += kAtOnce) {
      Bits c0[kAtOnce], c1[kAtOnce], c2[kAtOnce], c3[kAtOnce];
#pragma GCC unroll 4
      for (int v = 0; v < kAtOnce; ++v) {
        c0[v] =
            add_wide(bits_load(lanes_), bits_all(static_cast<uint64_t>(first / 4 + (first_vector + v) * kBitLanes)));
        c1[v] = bits_all(row);
        c2[v] = bits_all(row >> 32);
        c3[v] = bits_all(offset_);
      }
#pragma GCC unroll 10
      for (int round = 0; round < kPhiloxRounds; ++round) {
#pragma GCC unroll 4
        for (int v = 0; v < kAtOnce; ++v) {
          const Bits p0 = multiply_low(c0[v], m0), p1 = multiply_low(c2[v], m1);
          c0[v] = differ(differ(shift_down(p1), c1[v]), key0_[round]);
          c1[v] = p1;
          c2[v] = differ(differ(shift_down(p0), c3[v]), key1_[round]);
          c3[v] = p0;
        }
      }
#pragma GCC unroll 4
      for (int v = 0; v < kAtOnce; ++v) {
        const Bits low = join_low(c0[v], c1[v]), high = join_low(c2[v], c3[v]);
        uint64_t* out = pairs + 2 * (first_vector + v) * kBitLanes;
        bits_store(out, interleave_first(low, high));
        bits_store(out + kBitLanes, interleave_second(low, high));
      }
    }
    memcpy(draws, pairs, sizeof pairs);
  }

 private:
  Bits key0_[kPhiloxRounds], key1_[kPhiloxRounds];
  uint64_t lanes_[kBitLanes];
  uint32_t offset_;
};

// noise[i] = gumbel(draws[i]). In stages over all units: in one, the operations of a unit, each of which waits for the
// one before, would fill the processor's window.
template <int kUnits>
ENGRAM_INLINE void gumbels(const uint32_t* __restrict draws, float* __restrict noise) {
  alignas(64) float e[kUnits], s[kUnits];
  const auto take_log = [&](const float* x) {
    for (int i = 0; i < kUnits; ++i) {
      const LogParts parts = parts_of_log(x[i]);
      e[i] = parts.e, s[i] = parts.s;
    }
    for (int i = 0; i < kUnits; ++i) noise[i] = 0.0f - log_of_parts(e[i], s[i]);
  };
  for (int i = 0; i < kUnits; ++i) noise[i] = uniform(draws[i]);
  take_log(noise);
  take_log(noise);
}

}  // namespace engram::cpu::ENGRAM_ISA
