// value_signs, top_units and scale_values: what a packed network makes of the integers of a product, one row a sample.
//
//   value_signs  bits[m,n] = (y[m,n] >= threshold[n]) != flip[n], or y[m,n] >= mean of row m: N y[m,n] >= sum of the
//                row, since y is an integer at least the mean rounded up
//   top_units    the `count` largest of a row, equal ones by the lower number first
//   scale_values y[m,n] times factors, scaled and shifted, in float32
//
// Bound by reads of y, from the first-level cache in all passes but one.
#include <cstring>

#include "cpu/selection.h"
#include "cpu/tables.h"

namespace engram::cpu::ENGRAM_ISA {

namespace {

int32_t mean_rounded_up(const int32_t* y, int64_t n) {
  constexpr int64_t kChunk = int64_t{1} << 15;  // whose halves of 16 bits have sums of 32 bits
  int64_t sum = 0;
  for (int64_t first = 0; first < n; first += kChunk) {
    int32_t low = 0, high = 0;
    for (int64_t i = first; i < smaller(first + kChunk, n); ++i) low += y[i] & 0xFFFF, high += y[i] >> 16;
    sum += int64_t{high} * (1 << 16) + low;
  }
  return static_cast<int32_t>(sum > 0 ? (sum + n - 1) / n : sum / n);
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
  SearchStart start;
  for (int64_t row = rows.begin; row < rows.end; ++row)
    top_of_row(p.y + row * p.K, p.K, p.count, p.gate + row * words_for(p.K), start);
}

}  // namespace engram::cpu::ENGRAM_ISA
