// Compact numbers and how they round. Rounding is stochastic and unbiased: the random bits of a draw are added below
// the last bit that is kept, so that a value between two neighbours becomes the upper one with the probability of its
// distance from the lower. A moving average would otherwise stand still once its steps are less than half a unit.
//
//   bfloat16   the upper half of a float32
//   moments in blocks of 64 units of a row, with a scale per block, a power of two:
//   first      int8, sign and magnitude 0 .. 127; magnitude c stands for scale * (E(c) - 2^-15)
//   second     uint8 0 .. 255;                    code c stands for      scale * (E(c) - 2^-31)
//              E(c) is the float whose bits are those of 2^-15 (2^-31) plus c << 20: three bits of mantissa in every
//              octave, as in an 8-bit float, and evenly spaced near 0.
//   scale      the least power of two for which the largest magnitude of the block is at most what the largest code
//              stands for, about 1.875 scales. So every magnitude lies between two codes, and an average that grows
//              climbs into the next octave. (A scale that is the exponent of the largest magnitude, which reaches 2
//              scales, would hold it down at 1.875.)
//
// The range of a block is its limit below. First moments are spaced 2^-18 scales apart near 0. Second moments are
// spaced 2^-34 scales apart there and none is held at less than that, lest the quotient of the moments explode: one
// gradient more than about 10^6 times as large as the others of its block holds their steps down until it has decayed.
//
// 16 random bits round both moments of a unit: half `unit % 2` (low half first) of the draw of unit / 2. Where the
// weight is bfloat16, the unit has a draw of its own: the low half for the moments, the high half for the weight. Only
// single IEEE operations on floats: every backend computes the same bits.
//
// A draw follows from seed, offset, row and number alone, not from threads, block sizes or the device. It is a counter
// stepped by the golden ratio and mixed by two multiplications (the constants: Wellons 2018, "lowbias32"), which takes
// a fifth of the operations of Philox. Where the counter of a row starts, and what its mixing is keyed with, are mixed
// likewise from the row and a Philox counter of the step. That is enough for rounding, whose draws are looked at one by
// one; what samples engrams is Philox itself.
#pragma once

#include <cstdint>

#include "core/philox.h"

namespace engram {

constexpr int64_t kScaleBlock = 64;

constexpr int kDrop = 20;                             // bits of a float below the three of mantissa
constexpr uint32_t kFirstBits = uint32_t{112} << 23;  // 2^-15
constexpr uint32_t kSecondBits = uint32_t{96} << 23;  // 2^-31
// Carries into the exponent the bits of every magnitude above what the largest code stands for, as a float: 1.875 -
// 2^-15 and, since 2^-31 is lost beside it, 1.875.
constexpr uint32_t kFirstCarry = (uint32_t{1} << 20) + (uint32_t{1} << 8) - 1;
constexpr uint32_t kSecondCarry = (uint32_t{1} << 20) - 1;

// What the draws of a step are keyed with.
struct RoundingKey {
  uint32_t word[4];
};
ENGRAM_FUNCTION RoundingKey rounding_key(uint64_t seed, uint32_t offset) {
  const PhiloxDraws draws = philox(seed, 0, 0, offset);
  return {{draws.word[0], draws.word[1], draws.word[2], draws.word[3]}};
}

// T: uint32_t, or a vector of them.
template <typename T>
ENGRAM_FUNCTION T mixed(T x, uint32_t key) {
  x = (x ^ x >> 16) * 0x7FEB352Du;
  x = (x ^ x >> 15 ^ key) * 0x846CA68Bu;
  return x ^ x >> 16;
}

// The draws of a row.
struct RoundingRow {
  uint32_t start, key;
};
ENGRAM_FUNCTION RoundingRow rounding_row(const RoundingKey& step, uint64_t row) {
  const uint32_t low = static_cast<uint32_t>(row), high = static_cast<uint32_t>(row >> 32);
  return {mixed(step.word[0] + low, step.word[1] + high), mixed(step.word[2] + low, step.word[3] + high)};
}
constexpr uint32_t kDrawStep = 0x9E3779B9u;
ENGRAM_FUNCTION uint32_t rounding_draw(RoundingRow row, uint32_t number) {
  return mixed(row.start + number * kDrawStep, row.key);
}

ENGRAM_FUNCTION uint16_t to_bfloat16(float x, uint32_t random16) {
  return static_cast<uint16_t>((bits_from_float(x) + random16) >> 16);
}
ENGRAM_FUNCTION float from_bfloat16(uint16_t x) { return float_from_bits(static_cast<uint32_t>(x) << 16); }

// The scale of a block whose largest magnitude has these bits: 0 for a block of zeros, at most 2^126, so that its
// reciprocal is a normal number; what lies above 1.875 * 2^126 is held as the largest code.
ENGRAM_FUNCTION float block_scale(uint32_t largest_bits, uint32_t carry) {
  const uint32_t exponent = (largest_bits + carry) & 0x7F800000u, limit = uint32_t{253} << 23;
  return float_from_bits(exponent < limit ? exponent : limit);
}
ENGRAM_FUNCTION float reciprocal_of_scale(float scale) {
  const uint32_t bits = bits_from_float(scale);
  return float_from_bits(bits == 0 ? 0u : (uint32_t{254} << 23) - bits);
}

// The noise of a moment by the low half of a draw, which is added to bits of which kDrop are cut off: the middle of one
// of 2^16 steps.
template <typename T>
ENGRAM_FUNCTION T moment_noise(T random) {
  return ((random << (kDrop - 16)) & (0xFFFFu << (kDrop - 16))) | (1u << (kDrop - 17));
}

ENGRAM_FUNCTION int8_t to_first_moment(float x, float reciprocal, uint32_t noise) {
  const float magnitude = float_from_bits(bits_from_float(x) & 0x7FFFFFFFu) * reciprocal + float_from_bits(kFirstBits);
  const uint32_t code = (bits_from_float(magnitude) - kFirstBits + noise) >> kDrop;
  const int32_t clamped = static_cast<int32_t>(code < 127u ? code : 127u);
  return static_cast<int8_t>(x < 0.0f ? -clamped : clamped);
}
ENGRAM_FUNCTION float from_first_moment(int8_t code, float scale) {
  const int32_t magnitude = code < 0 ? -code : code;
  const float value =
      float_from_bits((static_cast<uint32_t>(magnitude) << kDrop) + kFirstBits) - float_from_bits(kFirstBits);
  return (code < 0 ? -value : value) * scale;
}

ENGRAM_FUNCTION uint8_t to_second_moment(float x, float reciprocal, uint32_t noise) {
  const float value = x * reciprocal + float_from_bits(kSecondBits);
  const uint32_t code = (bits_from_float(value) - kSecondBits + noise) >> kDrop;
  return static_cast<uint8_t>(code < 1u ? 1u : code < 255u ? code : 255u);
}
ENGRAM_FUNCTION float from_second_moment(uint8_t code, float scale) {
  return (float_from_bits((static_cast<uint32_t>(code) << kDrop) + kSecondBits) - float_from_bits(kSecondBits)) * scale;
}

}  // namespace engram
