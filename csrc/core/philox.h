// Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
//
// The draw of unit `column` of sample `row` is word `column % 4` of
//     philox(key = seed, counter = (column / 4, row low, row high, offset))
// and depends on nothing else: not on threads, block sizes or the device.
//
// gumbel() and natural_log() use only IEEE-754 single-precision operations in a fixed order and must be compiled
// without contraction to fused multiply-add; then every device, and the PyTorch reference, computes the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/bits.h"

namespace engram {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

struct PhiloxDraws {
  uint32_t word[4];
};

// The draws of units 4 group .. 4 group + 3 of a row; cpu/draws.h computes the same numbers in vectors.
ENGRAM_FUNCTION PhiloxDraws philox(uint64_t seed, uint64_t group, uint64_t row, uint32_t offset) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = static_cast<uint32_t>(group), c1 = static_cast<uint32_t>(row);
  uint32_t c2 = static_cast<uint32_t>(row >> 32), c3 = offset;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * kPhiloxM0, p1 = static_cast<uint64_t>(c2) * kPhiloxM1;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ key0, c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ key1, c3 = static_cast<uint32_t>(p0);
    key0 += kPhiloxW0, key1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

ENGRAM_FUNCTION float float_from_bits(uint32_t bits) {
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}

ENGRAM_FUNCTION uint32_t bits_from_float(float f) {
  uint32_t bits;
  memcpy(&bits, &f, sizeof bits);
  return bits;
}

// ln(x) for positive normal x, absolute error below 2e-7 * max(1, |ln x|).
// x = 2^e * m with m in [sqrt(1/2), sqrt(2)); ln m = 2 atanh(s), s = (m - 1) / (m + 1), by its series in s^2. In two
// parts, between which cpu/draws.h keeps the numbers of many units.
struct LogParts {
  float e, s;
};
ENGRAM_FUNCTION LogParts parts_of_log(float x) {
  const uint32_t bits = bits_from_float(x);
  const int32_t e = static_cast<int32_t>(bits - 0x3F3504F3u) >> 23;
  const float m = float_from_bits(bits - (static_cast<uint32_t>(e) << 23));
  return {static_cast<float>(e), (m - 1.0f) / (m + 1.0f)};
}
ENGRAM_FUNCTION float log_of_parts(float e, float s) {
  const float z = s * s;
  float p = z * 0.11111111f + 0.14285714f;
  p = p * z + 0.2f;
  p = p * z + 0.33333334f;
  p = p * z + 1.0f;
  return e * 0.6931472f + (s + s) * p;
}
ENGRAM_FUNCTION float natural_log(float x) {
  const LogParts parts = parts_of_log(x);
  return log_of_parts(parts.e, parts.s);
}

// Standard Gumbel variate from 32 random bits: -ln(-ln u), u = (r / 2^9 + 1/2) / 2^23, strictly inside (0, 1).
ENGRAM_FUNCTION float uniform(uint32_t r) {
  return (static_cast<float>(static_cast<int32_t>(r >> 9)) + 0.5f) * 0x1p-23f;
}
ENGRAM_FUNCTION float gumbel(uint32_t r) { return 0.0f - natural_log(0.0f - natural_log(uniform(r))); }

// Maps floats to unsigned integers of the same order; -0 and +0 map to the same integer. x must not be NaN.
ENGRAM_FUNCTION uint32_t ordered_key(float x) {
  const uint32_t bits = bits_from_float(x + 0.0f);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

}  // namespace engram
