// The largest of a row of integers.
#pragma once

#include <cstring>

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

// By several vectors of counts, which need not wait for each other.
ENGRAM_INLINE int64_t number_at_least(const int32_t* y, int64_t k, int32_t threshold) {
  using Ints = int32_t __attribute__((vector_size(kVectorBytes)));
  constexpr int kInts = kVectorBytes / static_cast<int>(sizeof(int32_t)), kVectors = 4;
  constexpr int64_t kChunk = int64_t{1} << 30;  // whose number an int32 holds
  int64_t number = 0;
  for (int64_t first = 0; first < k; first += kChunk) {
    const int64_t end = smaller(first + kChunk, k);
    Ints minus_below[kVectors] = {};  // a comparison that holds is -1
    int64_t i = first;
    for (; i + kVectors * kInts <= end; i += kVectors * kInts)
      for (int v = 0; v < kVectors; ++v) {
        Ints own;
        memcpy(&own, y + i + v * kInts, sizeof own);
        minus_below[v] += own < threshold;
      }
    const Ints sum = (minus_below[0] + minus_below[1]) + (minus_below[2] + minus_below[3]);
    number += i - first;
    for (int j = 0; j < kInts; ++j) number += sum[j];
    for (; i < end; ++i) number += y[i] >= threshold;
  }
  return number;
}

// Where the search for the threshold of a row begins: at that of the row before, from which rows of a batch differ
// little. It changes how many passes a row takes, not its result.
struct SearchStart {
  bool known = false;
  int64_t threshold = 0;
  double step = 0;  // values between two units about there
};

// Sets the bits of the `count` largest, 1 <= count <= k, equal ones by the lower number first.
//
// The count-th largest lies between two bounds: `low` is reached by `count` units or more, `high` by fewer. A few steps
// from the start of the search find them; where they do not, or without a start, the least and the greatest value are
// the bounds. Each further pass counts what reaches a candidate between them: where a straight line between their
// counts has the value `count`, or, when the pass before has left more than half, in the middle. Evenly spread values
// take a handful of passes, any values at most twice the bits of their range and those steps.
ENGRAM_INLINE void top_of_row(const int32_t* y, int64_t k, int64_t count, uint64_t* gate, SearchStart& start) {
  int64_t low = INT32_MIN, high = int64_t{INT32_MAX} + 1, of_low = k, of_high = 0;
  bool low_found = false, high_found = false;
  const auto count_from = [&](int64_t candidate) {
    const int64_t reached = number_at_least(y, k, static_cast<int32_t>(candidate));
    if (reached >= count)
      low = candidate, of_low = reached, low_found = true;
    else
      high = candidate, of_high = reached, high_found = true;
    return reached;
  };
  if (start.known) {
    constexpr int kSteps = 3;
    const int64_t missing = count_from(start.threshold) - count;
    const double step = start.step * static_cast<double>(missing < 0 ? -missing : missing);
    int64_t stride = 1 + static_cast<int64_t>(step);
    for (int i = 0; i < kSteps && !(low_found && high_found) && high - low > 1 && of_low != count; ++i, stride *= 2)
      count_from(low_found ? low + smaller(stride, high - low - 1) : high - smaller(stride, high - low - 1));
  }
  if (!(low_found && high_found) && of_low != count) {
    int32_t least = y[0], greatest = y[0];
    for (int64_t i = 0; i < k; ++i) {
      least = y[i] < least ? y[i] : least;
      greatest = y[i] > greatest ? y[i] : greatest;
    }
    if (!low_found) low = least;
    if (!high_found) high = int64_t{greatest} + 1;
  }
  bool halve = false;
  while (high - low > 1 && of_low != count) {
    const int64_t range = high - low;
    int64_t step = range / 2;
    if (!halve) {
      const double share = static_cast<double>(of_low - count) / static_cast<double>(of_low - of_high);
      step = static_cast<int64_t>(share * static_cast<double>(range));
      step = step < 1 ? 1 : smaller(step, range - 1);
    }
    count_from(low + step);
    halve = !halve && high - low > range / 2;
  }
  if (low_found && high_found) start.step = static_cast<double>(high - low) / static_cast<double>(of_low - of_high);
  start.known = true, start.threshold = low;
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
