// sample_engram: recruits units, one gate row per sample.
//
//   bernoulli    recruited where the 32-bit draw is below rate * 2^32, independently
//   Gumbel-top-k the `count` units of largest score / temperature + Gumbel draw: sampling without replacement with
//                probabilities softmax(score / temperature) (Vieira 2014; Kool et al. 2019); ties go to the lower index
//
// Draws are those of core/philox.h. Keys are ordered integers, so that the count-th largest is found by counting passes
// over keys in the first-level cache, and no sort. This file is compiled without fused multiply-add: every backend
// computes the same bits.
#include <type_traits>

#include "cpu/draws.h"
#include "cpu/selection.h"
#include "cpu/tables.h"

namespace engram::cpu::ENGRAM_ISA {

namespace {

// Of a sample, for the draws.
uint64_t row_number(const SampleEngram& p, int64_t m) { return p.first_row + static_cast<uint64_t>(m) * p.row_step; }

// Calls f(first, units) on a row in parts of kDrawGroup units, and what is left in words: f's second argument is a
// constant.
template <typename F>
ENGRAM_INLINE void for_groups(int64_t k, const F& f) {
  int64_t first = 0;
  for (; first + kDrawGroup <= k; first += kDrawGroup) f(first, std::integral_constant<int, kDrawGroup>());
  for (; first < k; first += kWordBits) f(first, std::integral_constant<int, kWordBits>());
}

void bernoulli_row(const SampleEngram& p, const Draws& source, int64_t m) {
  uint64_t* gate = p.gate + m * p.words;
  for_groups(p.K, [&](int64_t first, auto units) {
    uint32_t draws[units];
    source.group<units>(row_number(p, m), first, draws);
    for (int64_t j = 0; j < units / kWordBits; ++j) {
      uint64_t bits = 0;
      for (int64_t i = 0; i < kWordBits; ++i)
        bits |= static_cast<uint64_t>(draws[j * kWordBits + i] < p.threshold) << i;
      const int64_t word = first / kWordBits + j;
      gate[word] = bits & valid_bits(word, p.K);
    }
  });
  for (int64_t word = ceil_div(p.K, kWordBits); word < p.words; ++word) gate[word] = 0;
}

// keys[k]: signed integers in the order of score / temperature + gumbel; true if a score is NaN.
bool make_keys(const SampleEngram& p, const Draws& source, int64_t m, int32_t* keys) {
  const bool noisy = p.inverse_temperature >= 0.0f, scored = p.inverse_temperature != 0.0f;
  int32_t nan = 0;
  for_groups(p.K, [&](int64_t first, auto units) {
    alignas(64) float value[units], noise[units];
    alignas(64) uint32_t draws[units];
    if (scored) {
      const float* score = p.score + m * p.K + first;
      if (first + units <= p.K) {
        memcpy(value, score, sizeof value);
      } else {
        for (int i = 0; i < units; ++i) value[i] = first + i < p.K ? score[i] : 0.0f;
      }
      for (int i = 0; i < units; ++i) nan |= value[i] != value[i];
    }
    if (noisy) {
      source.group<units>(row_number(p, m), first, draws);
      gumbels<units>(draws, noise);
      if (scored)
        for (int i = 0; i < units; ++i) value[i] = value[i] * p.inverse_temperature + noise[i];
      else
        memcpy(value, noise, sizeof value);
    }
    for (int i = 0; i < units; ++i) keys[first + i] = static_cast<int32_t>(ordered_key(value[i]) ^ 0x80000000u);
  });
  return nan != 0;
}

}  // namespace

bool sample_engram(const SampleEngram& p, Range samples) {
  const Draws source(p.seed, p.offset);
  SearchStart start;
  bool nan = false;
  for (int64_t m = samples.begin; m < samples.end; ++m) {
    if (p.bernoulli) {
      bernoulli_row(p, source, m);
    } else {
      auto* keys = reinterpret_cast<int32_t*>(p.keys);
      nan |= make_keys(p, source, m, keys);
      top_of_row(keys, p.K, p.count, p.gate + m * p.words, start);
    }
  }
  return nan;
}

}  // namespace engram::cpu::ENGRAM_ISA
