// grouped_product: uint8 numbers times signs that come in groups of kGroup inputs. Exact.
//
//   y[m,n] = sum_k x[m,k] s(w[n,k]) = 2 sum_{k: bit 1} x[m,k] - sum_k x[m,k]
//
//   x       [M, K] uint8
//   groups  [ceil(K / 12), N rounded up to 32] uint16: 6 bits of each output in its low byte, 6 in its high byte
//   y       [M, N] int32
//
// The 64 sums of the subsets of 6 numbers fill two registers, so that one permutation looks up the sums of 32 outputs:
// 192 products. A group is two such halves, and its bits are read once for both. Two groups of two samples are looked
// up together: of their 16 registers of tables each serves all outputs, and an index serves both samples. Groups that
// are 0 in both, as most are at the borders of images, are left out. Sums are held in 16 bits as long as the numbers
// added so far allow it, and nothing is ever transposed.
// Bound by the permutations, one a cycle on Zen 4, and the additions beside them; groups stream from the second-level
// cache in less time.
#include <cstring>

#include "cpu/simd.h"
#include "cpu/tables.h"

#if defined(ENGRAM_HAS_SUBSET_LOOK_UP)

namespace engram::cpu::ENGRAM_ISA {

namespace {

constexpr int kSamples = 2;
constexpr int kAtOnce = 2;  // groups
constexpr int kHalf = kGroup / 2;
constexpr int64_t kVectors = 64;  // of outputs, whose sums stay in the first-level cache
constexpr int64_t kPending = 24;  // groups gathered before they are added: a multiple of kAtOnce
constexpr int32_t kLargestSum = UINT16_MAX;

// The numbers of half a group as bytes of a word, 0 beyond the row.
ENGRAM_INLINE uint64_t numbers_from(const uint8_t* row, int64_t k, int64_t first) {
  uint64_t word = 0;
  if (first + 8 <= k) {
    memcpy(&word, row + first, 8);
    return word & ((uint64_t{1} << (8 * kHalf)) - 1);
  }
  if (first < k) memcpy(&word, row + first, static_cast<size_t>(smaller<int64_t>(kHalf, k - first)));
  return word;
}

ENGRAM_INLINE int32_t sum_of(uint64_t numbers) {
  const uint64_t pairs = (numbers & 0x00FF00FF00FF00FFu) + (numbers >> 8 & 0x00FF00FF00FF00FFu);
  return static_cast<int32_t>(pairs * 0x0001000100010001u >> 48);
}

// Groups of S samples that are not 0 in all of them.
template <int S>
struct Pending {
  int64_t count = 0;
  int64_t group[kPending];
  uint64_t numbers[kPending][2][S];
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
      for (int64_t j = i; j < smaller(i + kAtOnce, pending.count); ++j)
        for (int s = 0; s < S; ++s) of_these[s] += sum_of(pending.numbers[j][0][s]) + sum_of(pending.numbers[j][1][s]);
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
      for (int64_t v = 0; v < vectors_; ++v) {
        const int64_t left = outputs_.end - outputs_.begin - v * kGroupedRows;
        int32_t* to = y + v * kGroupedRows;
        int32_t tail[kGroupedRows];
        if (left < kGroupedRows) {
          if (written_) memcpy(tail, to, static_cast<size_t>(left) * sizeof *to);
          to = tail;
        }
        add_twice(to, shorts_load(sums_[v][s]), less, written_);
        if (left < kGroupedRows) memcpy(y + v * kGroupedRows, tail, static_cast<size_t>(left) * sizeof *to);
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
      const bool there = first + i < pending.count;
      indices[i] = p_.groups + (there ? pending.group[first + i] : pending.group[first]) * p_.stride + outputs_.begin;
      for (int half = 0; half < 2; ++half)
        for (int s = 0; s < S; ++s) table[i][half][s] = subset_sums(there ? pending.numbers[first + i][half][s] : 0);
    }
    for (int64_t v = 0; v < vectors_; ++v) look_up_vector(table, indices, v);
  }

  // A function of its own, whose registers the compiler keeps free for tables.
  [[gnu::always_inline]] void look_up_vector(const SubsetSums (*table)[2][S], const uint16_t* const* indices,
                                             int64_t v) {
    Shorts sum[S];
    for (int s = 0; s < S; ++s) sum[s] = shorts_load(sums_[v][s]);
#pragma GCC unroll 8
    for (int i = 0; i < kAtOnce; ++i) {
      const Shorts index = shorts_load(indices[i] + v * kGroupedRows), other = shorts_high_bytes(index);
      for (int s = 0; s < S; ++s) {
        sum[s] = shorts_add(sum[s], look_up_subset(table[i][0][s], index));
        sum[s] = shorts_add(sum[s], look_up_subset(table[i][1][s], other));
      }
    }
    for (int s = 0; s < S; ++s) shorts_store(sums_[v][s], sum[s]);
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
    uint64_t any = 0;
    for (int s = 0; s < S; ++s) {
      for (int half = 0; half < 2; ++half) {
        const uint64_t numbers = numbers_from(p.x + (m + s) * p.K, p.K, group * kGroup + half * kHalf);
        pending.numbers[pending.count][half][s] = numbers;
        any |= numbers;
      }
    }
    pending.group[pending.count] = group;
    pending.count += any != 0;
    if (pending.count == kPending) {
      sums.add(pending);
      pending.count = 0;
    }
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
    for (; m < part.rows.end; ++m) product_of<1>(p, m, outputs);
  }
}

}  // namespace engram::cpu::ENGRAM_ISA

#endif
