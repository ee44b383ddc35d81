// sign_product: every product of real numbers with a whole sign matrix, four signs a look-up.
//
//   y[r,v] = sum_i a[r,i] s(B[v,i])             a [R, I] float or uint8, B [V, words] packed signs
//   y[r,v] = sum_i a[r,i] (P[v,i] - Q[v,i])     P, Q packed, nowhere both 1: signs with a gate
//
// Signs that lie along v (core/operands.h) come transposed.
//
// look_up.h tabulates the sums of four consecutive i for a tile of r. uint8 terms are summed in int16 and widened into
// int32: exact. Bound by one load and one addition a vector: a quarter of the additions that masks would take, an
// eighth with uint8. The order of summation does not depend on how the work is shared out.
#include <cstring>
#include <type_traits>

#include "cpu/look_up.h"
#include "cpu/tables.h"

namespace engram::cpu::ENGRAM_ISA {

namespace {

// Columns that share a table: 64 KiB of sums, on the stack.
template <typename T>
constexpr int64_t kColumnBlock = 65536 / (kTile<T> * sizeof(typename Term<T>::Sum));

// terms[i][j] = a[r + j, first + i], zero outside a.
template <typename T>
void gather(const StridedSignProduct& p, int64_t first, int64_t r, typename Term<T>::Entry (*terms)[kTile<T>]) {
  const int64_t used = smaller(kWordBits, p.I - first), rows = smaller<int64_t>(kTile<T>, p.R - r);
  const T* a = static_cast<const T*>(p.a) + r * p.r_stride + first * p.i_stride;
  if (used < kWordBits || rows < kTile<T>) memset(terms, 0, kWordBits * sizeof *terms);
  if (p.r_stride == 1) {
    for (int64_t i = 0; i < used; ++i)
      for (int64_t j = 0; j < rows; ++j) terms[i][j] = a[i * p.i_stride + j];
    return;
  }
  if constexpr (std::is_same_v<T, float>) {
    if (p.i_stride == 1) return write_transposed(a, p.r_stride, rows, used, &terms[0][0], kTile<T>);
  }
  for (int64_t j = 0; j < rows; ++j)
    for (int64_t i = 0; i < used; ++i) terms[i][j] = a[i * p.i_stride + j * p.r_stride];
}

// Adds to (first: stores in) sums[c][..] the entries of Columns columns, which words plus[at + c * words] choose.
template <typename T, int Columns, bool Subset>
ENGRAM_INLINE void look_up(const char* table, int groups, const uint64_t* plus, const uint64_t* minus, int64_t at,
                           int64_t words, bool first, typename Term<T>::Sum (*sums)[kTile<T>]) {
  using Entry = typename Term<T>::Entry;
  using Sum = typename Term<T>::Sum;
  Vector<Entry> acc[Columns][kVectors];
  uint64_t added[Columns], subtracted[Columns];
  for (int c = 0; c < Columns; ++c) {
    added[c] = plus[at + c * words];
    if constexpr (Subset) subtracted[c] = minus[at + c * words];
  }
  look_up_sums<T, Columns, Subset>(table, groups, added, subtracted, acc);
  for (int c = 0; c < Columns; ++c) {
    if constexpr (sizeof(Entry) == sizeof(Sum)) {
      for (int v = 0; v < kVectors; ++v) {
        char* sum = reinterpret_cast<char*>(sums[c]) + v * kVectorBytes;
        store_vector<Sum>(sum, first ? acc[c][v] : load_vector<Sum>(sum) + acc[c][v]);
      }
    } else {
      Entry narrow[kTile<T>];
      for (int v = 0; v < kVectors; ++v)
        store_vector<Entry>(reinterpret_cast<char*>(narrow) + v * kVectorBytes, acc[c][v]);
      for (int j = 0; j < kTile<T>; ++j) sums[c][j] = (first ? 0 : sums[c][j]) + narrow[j];
    }
  }
}

template <typename T, bool Subset>
void product(const StridedSignProduct& p, Block part) {
  alignas(64) typename Term<T>::Entry terms[kWordBits][kTile<T>];
  alignas(64) char table[kGroups * kEntries * kEntryBytes];
  alignas(64) typename Term<T>::Sum sums[kColumnBlock<T>][kTile<T>];
  for (int64_t r = part.rows.begin; r < part.rows.end; r += kTile<T>) {
    for (int64_t v = part.columns.begin; v < part.columns.end; v += kColumnBlock<T>) {
      const int64_t columns = smaller(kColumnBlock<T>, part.columns.end - v);
      if (p.I == 0) memset(sums, 0, static_cast<size_t>(columns) * sizeof *sums);
      for (int64_t first = 0; first < p.I; first += kWordBits) {
        gather<T>(p, first, r, terms);
        const int groups = static_cast<int>((smaller(kWordBits, p.I - first) + kSigns - 1) / kSigns);
        tabulate<T, Subset>(terms[0], kTile<T>, groups, table);
        const uint64_t* plus = p.plus + v * p.words + first / kWordBits;
        const uint64_t* minus = Subset ? p.minus + v * p.words + first / kWordBits : nullptr;
        int64_t c = 0;
        for (; c + kLookUpColumns <= columns; c += kLookUpColumns)
          look_up<T, kLookUpColumns, Subset>(table, groups, plus, minus, c * p.words, p.words, first == 0, sums + c);
        for (; c < columns; ++c)
          look_up<T, 1, Subset>(table, groups, plus, minus, c * p.words, p.words, first == 0, sums + c);
      }
      using Sum = typename Term<T>::Sum;
      write_transposed(&sums[0][0], kTile<T>, columns, smaller<int64_t>(kTile<T>, p.R - r),
                       static_cast<Sum*>(p.y) + r * p.y_stride + v, p.y_stride);
    }
  }
}

}  // namespace

void sign_product(const StridedSignProduct& p, Block part) {
  if (p.element == Element::kUint8)
    product<uint8_t, false>(p, part);
  else if (p.minus == nullptr)
    product<float, false>(p, part);
  else
    product<float, true>(p, part);
}

}  // namespace engram::cpu::ENGRAM_ISA
