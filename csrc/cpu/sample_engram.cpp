// sample_engram: recruits units, one gate row per sample.
//
//   bernoulli    recruited where the 32-bit draw is below rate * 2^32, independently
//   Gumbel-top-k the `count` units of largest score / temperature + Gumbel draw: sampling without replacement with
//                probabilities softmax(score / temperature) (Vieira 2014; Kool et al. 2019); ties go to the lower index
//
// Draws are those of core/philox.h. Keys are ordered integers, so that the count-th largest is found by counting passes
// over keys in the first-level cache, and no sort. This file is compiled without fused multiply-add: every backend
// computes the same bits.
#include "cpu/draws.h"
#include "cpu/selection.h"
#include "cpu/tables.h"

namespace engram::cpu::ENGRAM_ISA {

namespace {

// Of a sample, for the draws.
uint64_t row_number(const SampleEngram& p, int64_t m) { return p.first_row + static_cast<uint64_t>(m) * p.row_step; }

void bernoulli_row(const SampleEngram& p, const Draws& source, int64_t m) {
  uint32_t draws[kDrawGroup];
  uint64_t* gate = p.gate + m * p.words;
  for (int64_t word = 0; word < p.words; ++word) {
    uint64_t bits = 0;
    if (word * kWordBits < p.K) {
      source.group<kDrawGroup>(row_number(p, m), word * kWordBits, draws);
      for (int64_t i = 0; i < kDrawGroup; ++i) bits |= static_cast<uint64_t>(draws[i] < p.threshold) << i;
    }
    gate[word] = bits & valid_bits(word, p.K);
  }
}

// keys[k]: signed integers in the order of score / temperature + gumbel; true if a score is NaN.
bool make_keys(const SampleEngram& p, const Draws& source, int64_t m, int32_t* keys) {
  const float* score = p.score + m * p.K;
  const bool noisy = p.inverse_temperature >= 0.0f, scored = p.inverse_temperature != 0.0f;
  int32_t nan = 0;
  for (int64_t first = 0; first < p.K; first += kDrawGroup) {
    const int64_t units = smaller(kDrawGroup, p.K - first);
    float value[kDrawGroup] = {};
    if (scored && units == kDrawGroup)
      memcpy(value, score + first, sizeof value);
    else if (scored)
      memcpy(value, score + first, static_cast<size_t>(units) * sizeof(float));
    for (int64_t i = 0; i < kDrawGroup; ++i) nan |= value[i] != value[i];
    if (noisy) {
      uint32_t draws[kDrawGroup];
      source.group<kDrawGroup>(row_number(p, m), first, draws);
      if (scored)
        for (int64_t i = 0; i < kDrawGroup; ++i) value[i] = value[i] * p.inverse_temperature + gumbel(draws[i]);
      else
        for (int64_t i = 0; i < kDrawGroup; ++i) value[i] = gumbel(draws[i]);
    }
    for (int64_t i = 0; i < kDrawGroup; ++i)
      keys[first + i] = static_cast<int32_t>(ordered_key(value[i]) ^ 0x80000000u);
  }
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
