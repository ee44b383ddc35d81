// value_signs and top_units: what a packed network makes of the integers of a product, one row a sample.
//
//   value_signs  bits[m,n] = (y[m,n] >= threshold[n]) != flip[n], or y[m,n] >= mean of row m: N y[m,n] >= sum of the
//                row, since y is an integer at least the mean rounded up
//   top_units    the `count` largest of a row, equal ones by the lower number first
//
// Bound by reads of y, from the first-level cache in all passes but one.
#include "cpu/selection.h"
#include "cpu/tables.h"

namespace engram::cpu::ENGRAM_ISA {

namespace {

int32_t mean_rounded_up(const int32_t* y, int64_t n) {
  int64_t sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += y[i];
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

void top_units(const TopUnits& p, Range rows) {
  for (int64_t row = rows.begin; row < rows.end; ++row)
    top_of_row(p.y + row * p.K, p.K, p.count, p.gate + row * words_for(p.K));
}

}  // namespace engram::cpu::ENGRAM_ISA
