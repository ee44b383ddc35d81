// value_signs, top_units and scale_values: what a packed network makes of the integers of a product, one row a sample.
//
//   value_signs  bits[m,n] = (y[m,n] >= threshold[n]) != flip[n], or y[m,n] >= mean of row m: N y[m,n] >= sum of the
//                row, since y is an integer at least the mean rounded up
//   top_units    the `count` largest of a row, equal ones by the lower number first. The count-th largest is found by
//                bisection between the least and the greatest of the row: for sums of K signs at most log2(2 K) passes
//   scale_values y[m,n] times factors, scaled and shifted, in float32
//
// Bound by reads of y, from the first-level cache in all passes but one.
#include <cstring>

#include "cpu/simd.h"
#include "cpu/tables.h"

namespace engram::cpu::ENGRAM_ISA {

namespace {

template <typename Threshold>
void pack_at_least(const int32_t* y, int64_t n, const Threshold& threshold, uint64_t* bits) {
  for (int64_t word = 0; word < words_for(n); ++word) {
    const int64_t first = word * kWordBits, units = smaller(kWordBits, n - first);
    const Threshold own = threshold.from(first < n ? first : 0);
    bits[word] = units == kWordBits ? at_least_64(y + first, own) : at_least_plainly(y + first, units, own);
  }
}

int32_t mean_rounded_up(const int32_t* y, int64_t n) {
  int64_t sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += y[i];
  return static_cast<int32_t>(sum > 0 ? (sum + n - 1) / n : sum / n);
}

int64_t number_at_least(const int32_t* y, int64_t k, int32_t threshold) {
  int64_t number = 0;
  constexpr int64_t kChunk = int64_t{1} << 30;  // whose number an int32 holds
  for (int64_t first = 0; first < k; first += kChunk) {
    int32_t of_chunk = 0;
    for (int64_t i = first; i < smaller(first + kChunk, k); ++i) of_chunk += y[i] >= threshold;
    number += of_chunk;
  }
  return number;
}

void top_of_row(const int32_t* y, int64_t k, int64_t count, uint64_t* gate) {
  int32_t least = y[0], greatest = y[0];
  for (int64_t i = 0; i < k; ++i) {
    least = y[i] < least ? y[i] : least;
    greatest = y[i] > greatest ? y[i] : greatest;
  }
  // `low` is reached by `count` units or more, `high` by fewer
  int64_t low = least, high = int64_t{greatest} + 1, of_low = k, of_high = 0;
  while (high - low > 1 && of_low != count) {
    const int64_t middle = low + (high - low) / 2, reached = number_at_least(y, k, static_cast<int32_t>(middle));
    (reached >= count ? low : high) = middle;
    (reached >= count ? of_low : of_high) = reached;
  }
  pack_at_least(y, k, OneThreshold{static_cast<int32_t>(low)}, gate);
  // all above `low` are recruited: what is too many has that value, and the last ones of it leave
  int64_t surplus = of_low - count;
  for (int64_t word = words_for(k) - 1; surplus > 0; --word) {
    const int64_t first = word * kWordBits;
    for (int64_t i = smaller(kWordBits, k - first) - 1; i >= 0 && surplus > 0; --i) {
      if (y[first + i] != low) continue;
      gate[word] &= ~(uint64_t{1} << i);
      --surplus;
    }
  }
}

}  // namespace

void value_signs(const PreparedSigns& p, Range rows) {
  const int64_t words = words_for(p.N);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int32_t* y = p.y + row * p.N;
    uint64_t* bits = p.bits + row * words;
    if (p.threshold == nullptr)
      pack_at_least(y, p.N, OneThreshold{mean_rounded_up(y, p.N)}, bits);
    else
      pack_at_least(y, p.N, ThresholdEach{p.threshold}, bits);
    if (p.flip_bits == nullptr) continue;
    for (int64_t word = 0; word < words; ++word) bits[word] ^= p.flip_bits[word];
  }
}

void scale_values(const ScaleValues& p, Range rows) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    float* y = p.y + row * p.N;
    if (p.whole != nullptr)
      for (int64_t n = 0; n < p.N; ++n) y[n] = static_cast<float>(p.whole[row * p.N + n]);
    else if (p.real != p.y)
      memcpy(y, p.real + row * p.N, static_cast<size_t>(p.N) * sizeof *y);
    for (int64_t i = 0; i < p.factor_count; ++i)
      for (int64_t n = 0; n < p.N; ++n) y[n] *= p.factors[i];
    if (p.scale != nullptr)
      for (int64_t n = 0; n < p.N; ++n) y[n] = __builtin_fmaf(y[n], p.scale[n], p.shift[n]);
    else if (p.shift != nullptr)
      for (int64_t n = 0; n < p.N; ++n) y[n] += p.shift[n];
  }
}

void top_units(const TopUnits& p, Range rows) {
  for (int64_t row = rows.begin; row < rows.end; ++row)
    top_of_row(p.y + row * p.K, p.K, p.count, p.gate + row * words_for(p.K));
}

}  // namespace engram::cpu::ENGRAM_ISA
