// Compact numbers and how they round. Rounding is stochastic and unbiased: the random bits of a draw are added below
// the last bit that is kept, so that a value between two neighbours becomes the upper one with the probability of its
// distance from the lower. A moving average would otherwise stand still once its steps are less than half a unit.
//
//   bfloat16   the upper half of a float32
//   moments in blocks of 64 units of a row, with a scale 2^e per block, the exponent of the largest magnitude:
//   first      int8, sign and magnitude 0 .. 127; magnitude c stands for scale * (E(c) - 2^-15)
//   second     uint8 0 .. 255;                    code c stands for      scale * (E(c) - 2^-31)
//              E(c) is the float whose bits are those of 2^-15 (2^-31) plus c << 20: three bits of mantissa in every
//              octave, as in an 8-bit float, and evenly spaced near 0. A second moment never rounds down to 0 in a
//              block that has a larger one, lest the quotient of the moments explode.
//
// 16 random bits round both moments of a unit: half `unit % 2` (low half first) of the draw of unit / 2, core/philox.h.
// Where the weight is bfloat16, the unit has a draw of its own: the low half for the moments, the high half for the
// weight. Only single IEEE operations on floats: every backend computes the same bits.
#pragma once

#include <cstdint>

#include "core/philox.h"

namespace engram {

constexpr int64_t kScaleBlock = 64;

constexpr int kDrop = 20;                             // bits of a float below the three of mantissa
constexpr uint32_t kFirstBits = uint32_t{112} << 23;  // 2^-15
constexpr uint32_t kSecondBits = uint32_t{96} << 23;  // 2^-31

ENGRAM_FUNCTION uint16_t to_bfloat16(float x, uint32_t random16) {
  return static_cast<uint16_t>((bits_from_float(x) + random16) >> 16);
}
ENGRAM_FUNCTION float from_bfloat16(uint16_t x) { return float_from_bits(static_cast<uint32_t>(x) << 16); }

// The scale of a block whose largest magnitude has these bits: 0 for a block of zeros, at most 2^126, so that its
// reciprocal is a normal number; what lies above 2^127 is held as the largest code.
ENGRAM_FUNCTION float block_scale(uint32_t largest_bits) {
  const uint32_t exponent = largest_bits & 0x7F800000u, limit = uint32_t{253} << 23;
  return float_from_bits(exponent < limit ? exponent : limit);
}
ENGRAM_FUNCTION float reciprocal_of_scale(float scale) {
  const uint32_t bits = bits_from_float(scale);
  return float_from_bits(bits == 0 ? 0u : (uint32_t{254} << 23) - bits);
}

// What to add to bits of which kDrop are cut off: the middle of one of 2^16 steps.
ENGRAM_FUNCTION uint32_t moment_noise(uint32_t random16) { return (random16 << (kDrop - 16)) + (1u << (kDrop - 17)); }

ENGRAM_FUNCTION int8_t to_first_moment(float x, float reciprocal, uint32_t random16) {
  const float magnitude = float_from_bits(bits_from_float(x) & 0x7FFFFFFFu) * reciprocal + float_from_bits(kFirstBits);
  const uint32_t code = (bits_from_float(magnitude) - kFirstBits + moment_noise(random16)) >> kDrop;
  const int32_t clamped = static_cast<int32_t>(code < 127u ? code : 127u);
  return static_cast<int8_t>(x < 0.0f ? -clamped : clamped);
}
ENGRAM_FUNCTION float from_first_moment(int8_t code, float scale) {
  const int32_t magnitude = code < 0 ? -code : code;
  const float value =
      float_from_bits((static_cast<uint32_t>(magnitude) << kDrop) + kFirstBits) - float_from_bits(kFirstBits);
  return (code < 0 ? -value : value) * scale;
}

ENGRAM_FUNCTION uint8_t to_second_moment(float x, float reciprocal, uint32_t random16) {
  const float value = x * reciprocal + float_from_bits(kSecondBits);
  const uint32_t code = (bits_from_float(value) - kSecondBits + moment_noise(random16)) >> kDrop;
  return static_cast<uint8_t>(code < 1u ? 1u : code < 255u ? code : 255u);
}
ENGRAM_FUNCTION float from_second_moment(uint8_t code, float scale) {
  return (float_from_bits((static_cast<uint32_t>(code) << kDrop) + kSecondBits) - float_from_bits(kSecondBits)) * scale;
}

}  // namespace engram
