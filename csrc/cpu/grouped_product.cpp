// grouped_product: uint8 numbers times signs that come in groups of kGroup inputs. Exact.
//
//   y[m,n] = sum_k x[m,k] s(w[n,k]) = 2 sum_{k: bit 1} x[m,k] - sum_k x[m,k]
//
//   x       [M, K] uint8
//   groups  [ceil(K / 12), N rounded up to 32] uint16: 6 bits of each output in its low byte, 6 in its high byte
//   y       [M, N] int32
//
// The 64 sums of the subsets of 6 numbers fill two registers, so that one permutation looks up the sums of 32 outputs:
// 192 products. A group is two such halves, and its bits are read once for both. Two groups of three samples are looked
// up together: of their 24 registers of tables each serves all outputs, and an index serves all three samples. Groups
// that are 0 in all three, as most are at the borders of images, are left out. Sums are held in 16 bits as long as the
// numbers added so far allow it, and nothing is ever transposed.
// Bound by the permutations, one a cycle on Zen 4 and two on Zen 5: 192 and 384 products a cycle, with an addition and
// a sixth of a shift beside each. Zen 5 does 220. The look-ups alone do 265, whose loads of indices and copies of the
// registers that permutations overwrite bind them; tables and the way of the sums to y take the rest. Groups stream
// from the second-level cache in less time.
#include <cstring>

#include "cpu/simd.h"
#include "cpu/tables.h"

#if defined(ENGRAM_HAS_SUBSET_LOOK_UP)

namespace engram::cpu::ENGRAM_ISA {

namespace {

constexpr int kSamples = 3;
constexpr int kAtOnce = 2;        // groups
constexpr int64_t kVectors = 64;  // of outputs, whose sums stay in the first-level cache
constexpr int64_t kPending = 24;  // groups gathered before they are added: a multiple of kAtOnce
constexpr int32_t kLargestSum = UINT16_MAX;

// The numbers of a group, 0 beyond the row; false if all are 0.
ENGRAM_INLINE bool read_group(const uint8_t* row, int64_t k, int64_t first, SixNumbers* halves) {
  constexpr int kBytes = 16;
  if (first + kBytes <= k) return read_six_numbers(row + first, halves);
  uint8_t numbers[kBytes] = {};
  memcpy(numbers, row + first, static_cast<size_t>(smaller(kGroup, k - first)));
  return read_six_numbers(numbers, halves);
}

// Groups of S samples that are not 0 in all of them.
template <int S>
struct Pending {
  int64_t count = 0;
  int64_t group[kPending];
  SixNumbers numbers[kPending][S][2];
};

// The sums of S samples and a block of outputs.
template <int S>
class Sums {
 public:
  Sums(const GroupedProduct& p, int64_t m, Range outputs)
      : p_(p), m_(m), outputs_(outputs), vectors_((outputs.end - outputs.begin + kGroupedRows - 1) / kGroupedRows) {
    memset(sums_, 0, static_cast<size_t>(vectors_) * sizeof *sums_);
  }

  void add(const Pending<S>& pending) {
    for (int64_t i = 0; i < pending.count; i += kAtOnce) {
      int32_t of_these[S] = {};
      for (int64_t j = i; j < i + kAtOnce; ++j)
        for (int s = 0; s < S; ++s) of_these[s] += pending.numbers[j][s][0].sum + pending.numbers[j][s][1].sum;
      bool fits = true;
      for (int s = 0; s < S; ++s) fits &= held_[s] + of_these[s] <= kLargestSum;
      if (!fits) write(false);
      for (int s = 0; s < S; ++s) held_[s] += of_these[s], all_[s] += of_these[s];
      look_up_groups(pending, i);
    }
  }

  // Adds the sums to y; at the end less the sum of all numbers.
  void write(bool end) {
    for (int s = 0; s < S; ++s) {
      int32_t* y = p_.y + (m_ + s) * p_.N + outputs_.begin;
      const int32_t less = end ? all_[s] : 0;
      const int64_t units = outputs_.end - outputs_.begin, whole = units / kGroupedRows;
      if (written_)
        write_vectors<true>(sums_, whole, s, less, y);
      else
        write_vectors<false>(sums_, whole, s, less, y);
      if (whole < vectors_) {
        const size_t bytes = static_cast<size_t>(units - whole * kGroupedRows) * sizeof *y;
        int32_t tail[kGroupedRows];
        if (written_) memcpy(tail, y + whole * kGroupedRows, bytes);
        add_twice(tail, shorts_load(sums_[whole][s]), less, written_);
        memcpy(y + whole * kGroupedRows, tail, bytes);
      }
      held_[s] = 0;
    }
    written_ = true;
    if (!end) memset(sums_, 0, static_cast<size_t>(vectors_) * sizeof *sums_);
  }

 private:
  void look_up_groups(const Pending<S>& pending, int64_t first) {
    SubsetSums table[kAtOnce][2][S];
    const uint16_t* indices[kAtOnce];
    for (int i = 0; i < kAtOnce; ++i) {
      indices[i] = p_.groups + pending.group[first + i] * p_.stride + outputs_.begin;
      for (int half = 0; half < 2; ++half)
        for (int s = 0; s < S; ++s) table[i][half][s] = subset_sums(pending.numbers[first + i][s][half]);
    }
    add_look_ups(table, indices, vectors_, sums_);
  }

  // The number of vectors is an argument: a member would be read again after each store.
  [[gnu::always_inline]] static void add_look_ups(const SubsetSums (*table)[2][S], const uint16_t* const* indices,
                                                  int64_t vectors, uint16_t (*sums)[S][kGroupedRows]) {
    for (int64_t v = 0; v < vectors; ++v) {
      Shorts sum[S];
      for (int s = 0; s < S; ++s) sum[s] = shorts_load(sums[v][s]);
#pragma GCC unroll 8
      for (int i = 0; i < kAtOnce; ++i) {
        const Shorts index = shorts_load(indices[i] + v * kGroupedRows), other = shorts_high_bytes(index);
        for (int s = 0; s < S; ++s) {
          sum[s] = shorts_add(sum[s], look_up_subset(table[i][0][s], index));
          sum[s] = shorts_add(sum[s], look_up_subset(table[i][1][s], other));
        }
      }
      for (int s = 0; s < S; ++s) shorts_store(sums[v][s], sum[s]);
    }
  }

  template <bool ToY>
  static void write_vectors(const uint16_t (*sums)[S][kGroupedRows], int64_t vectors, int s, int32_t less, int32_t* y) {
    for (int64_t v = 0; v < vectors; ++v) add_twice(y + v * kGroupedRows, shorts_load(sums[v][s]), less, ToY);
  }

  const GroupedProduct& p_;
  const int64_t m_;
  const Range outputs_;
  const int64_t vectors_;
  alignas(64) uint16_t sums_[kVectors][S][kGroupedRows];
  int32_t held_[S] = {};  // the largest that a sum in 16 bits can be
  int32_t all_[S] = {};
  bool written_ = false;
};

template <int S>
void product_of(const GroupedProduct& p, int64_t m, Range outputs) {
  const int64_t groups = ceil_div(p.K, kGroup);
  Sums<S> sums(p, m, outputs);
  Pending<S> pending;
  for (int64_t group = 0; group < groups; ++group) {
    bool any = false;
    for (int s = 0; s < S; ++s)
      any |= read_group(p.x + (m + s) * p.K, p.K, group * kGroup, pending.numbers[pending.count][s]);
    pending.group[pending.count] = group;
    pending.count += any;
    if (pending.count == kPending) {
      sums.add(pending);
      pending.count = 0;
    }
  }
  for (int64_t i = pending.count; i % kAtOnce != 0; ++i) {  // a group of zeros completes the last ones
    pending.group[i] = 0;
    memset(pending.numbers[i], 0, sizeof pending.numbers[i]);
  }
  sums.add(pending);
  sums.write(true);
}

}  // namespace

void grouped_product(const GroupedProduct& p, Block part) {
  for (int64_t n = part.columns.begin; n < part.columns.end; n += kVectors * kGroupedRows) {
    const Range outputs{n, smaller(n + kVectors * kGroupedRows, part.columns.end)};
    int64_t m = part.rows.begin;
    for (; m + kSamples <= part.rows.end; m += kSamples) product_of<kSamples>(p, m, outputs);
    if (part.rows.end - m == 2) product_of<2>(p, m, outputs);
    if (part.rows.end - m == 1) product_of<1>(p, m, outputs);
  }
}

}  // namespace engram::cpu::ENGRAM_ISA

#endif
