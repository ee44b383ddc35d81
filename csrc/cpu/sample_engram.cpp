// sample_engram: recruits units, one gate row per sample.
//
//   bernoulli    recruited where the 32-bit draw is below rate * 2^32, independently
//   Gumbel-top-k the `count` units of largest score / temperature + Gumbel draw: sampling without replacement with
//                probabilities softmax(score / temperature) (Vieira 2014; Kool et al. 2019); ties go to the lower index
//
// Draws are those of core/philox.h. Keys are ordered integers, so that the count-th largest is found by bisection
// and no sort: at most 32 counting passes over keys in the first-level cache. This file is compiled without fused
// multiply-add: every backend computes the same bits.
#include "cpu/draws.h"
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

// keys[k] = ordered_key(score / temperature + gumbel); true if a score is NaN.
bool make_keys(const SampleEngram& p, const Draws& source, int64_t m) {
  const float* score = p.score + m * p.K;
  const bool noisy = p.inverse_temperature >= 0.0f, scored = p.inverse_temperature != 0.0f;
  bool nan = false;
  for (int64_t first = 0; first < p.K; first += kDrawGroup) {
    const int64_t units = smaller(kDrawGroup, p.K - first);
    float value[kDrawGroup] = {};
    if (scored) {
      for (int64_t i = 0; i < units; ++i) {
        value[i] = score[first + i];
        nan |= value[i] != value[i];
      }
    }
    if (noisy) {
      uint32_t draws[kDrawGroup];
      source.group<kDrawGroup>(row_number(p, m), first, draws);
      if (scored)
        for (int64_t i = 0; i < kDrawGroup; ++i) value[i] = value[i] * p.inverse_temperature + gumbel(draws[i]);
      else
        for (int64_t i = 0; i < kDrawGroup; ++i) value[i] = gumbel(draws[i]);
    }
    for (int64_t i = 0; i < units; ++i) p.keys[first + i] = ordered_key(value[i]);
  }
  return nan;
}

// A threshold such that the keys above it, and the first `of_equal` of those equal to it, are the `count` largest.
uint32_t find_threshold(const uint32_t* keys, int64_t k, int64_t count, int64_t& of_equal) {
  uint32_t threshold = 0;
  int64_t above = 0;  // keys above the threshold; right at the end, when the next larger candidate has been counted
  for (uint32_t bit = uint32_t{1} << 31; bit != 0; bit >>= 1) {
    const uint32_t candidate = threshold | bit;
    int32_t reached = 0;
    for (int64_t i = 0; i < k; ++i) reached += keys[i] >= candidate;
    if (reached == count) {
      of_equal = 0;
      return candidate - 1;
    }
    if (reached > count)
      threshold = candidate;
    else
      above = reached;
  }
  of_equal = count - above;
  return threshold;
}

void gate_from_keys(const SampleEngram& p, int64_t m) {
  int64_t of_equal = 0;
  const uint32_t threshold = find_threshold(p.keys, p.K, p.count, of_equal);
  uint64_t* gate = p.gate + m * p.words;
  for (int64_t word = 0; word < p.words; ++word) {
    const int64_t first = word * kWordBits, units = smaller(kWordBits, p.K - first);
    uint64_t above = 0, equal = 0;
    for (int64_t i = 0; i < units; ++i) {
      above |= static_cast<uint64_t>(p.keys[first + i] > threshold) << i;
      equal |= static_cast<uint64_t>(p.keys[first + i] == threshold) << i;
    }
    for (; equal != 0 && of_equal > 0; equal &= equal - 1, --of_equal) above |= equal & (~equal + 1);
    gate[word] = above;
  }
}

}  // namespace

bool sample_engram(const SampleEngram& p, Range samples) {
  const Draws source(p.seed, p.offset);
  bool nan = false;
  for (int64_t m = samples.begin; m < samples.end; ++m) {
    if (p.bernoulli) {
      bernoulli_row(p, source, m);
    } else {
      nan |= make_keys(p, source, m);
      gate_from_keys(p, m);
    }
  }
  return nan;
}

}  // namespace engram::cpu::ENGRAM_ISA
