// The largest of a row of integers.
#pragma once

#include "cpu/simd.h"

namespace engram::cpu::ENGRAM_ISA {

// Bit i of `bits`: y[i] >= threshold.of(i); padding 0.
template <typename Threshold>
ENGRAM_INLINE void pack_at_least(const int32_t* y, int64_t n, const Threshold& threshold, uint64_t* bits) {
  for (int64_t word = 0; word < words_for(n); ++word) {
    const int64_t first = word * kWordBits, units = smaller(kWordBits, n - first);
    const Threshold own = threshold.from(first < n ? first : 0);
    bits[word] = units == kWordBits ? at_least_64(y + first, own) : at_least_plainly(y + first, units, own);
  }
}

ENGRAM_INLINE int64_t number_at_least(const int32_t* y, int64_t k, int32_t threshold) {
  int64_t number = 0;
  constexpr int64_t kChunk = int64_t{1} << 30;  // whose number an int32 holds
  for (int64_t first = 0; first < k; first += kChunk) {
    int32_t of_chunk = 0;
    for (int64_t i = first; i < smaller(first + kChunk, k); ++i) of_chunk += y[i] >= threshold;
    number += of_chunk;
  }
  return number;
}

// Sets the bits of the `count` largest, 1 <= count <= k, equal ones by the lower number first.
//
// The count-th largest lies between the least and the greatest. Each pass counts what reaches a candidate between the
// bounds: where a straight line between their counts has the value `count`, or, when the pass before has left more than
// half, in the middle. Evenly spread values take a handful of passes, any values at most twice the bits of their range.
ENGRAM_INLINE void top_of_row(const int32_t* y, int64_t k, int64_t count, uint64_t* gate) {
  int32_t least = y[0], greatest = y[0];
  for (int64_t i = 0; i < k; ++i) {
    least = y[i] < least ? y[i] : least;
    greatest = y[i] > greatest ? y[i] : greatest;
  }
  // `low` is reached by `count` units or more, `high` by fewer
  int64_t low = least, high = int64_t{greatest} + 1, of_low = k, of_high = 0;
  bool halve = false;
  while (high - low > 1 && of_low != count) {
    const int64_t range = high - low;
    int64_t step = range / 2;
    if (!halve) {
      const double share = static_cast<double>(of_low - count) / static_cast<double>(of_low - of_high);
      step = static_cast<int64_t>(share * static_cast<double>(range));
      step = step < 1 ? 1 : smaller(step, range - 1);
    }
    const int64_t candidate = low + step, reached = number_at_least(y, k, static_cast<int32_t>(candidate));
    (reached >= count ? low : high) = candidate;
    (reached >= count ? of_low : of_high) = reached;
    halve = !halve && high - low > range / 2;
  }
  pack_at_least(y, k, OneThreshold{static_cast<int32_t>(low)}, gate);
  // all above `low` are recruited: what is too many has that value, and the last ones of it leave
  int64_t surplus = of_low - count;
  for (int64_t word = (k - 1) / kWordBits; surplus > 0; --word) {
    const int64_t first = word * kWordBits, units = smaller(kWordBits, k - first);
    const bool topmost = low == INT32_MAX;  // which nothing is above
    const OneThreshold next{static_cast<int32_t>(topmost ? low : low + 1)};
    const uint64_t reached =
        units == kWordBits ? at_least_64(y + first, next) : at_least_plainly(y + first, units, next);
    for (uint64_t equal = gate[word] & ~(topmost ? 0 : reached); equal != 0 && surplus > 0; --surplus) {
      const uint64_t last = uint64_t{1} << (kWordBits - 1 - __builtin_clzll(equal));
      gate[word] &= ~last, equal &= ~last;
    }
  }
}

}  // namespace engram::cpu::ENGRAM_ISA
