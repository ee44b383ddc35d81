// sign_product: every product of real numbers with a whole sign matrix, four signs a look-up.
//
//   y[r,v] = sum_i a[r,i] s(B[v,i])             a [R, I] float or uint8, B [V, words] packed signs
//   y[r,v] = sum_i a[r,i] (P[v,i] - Q[v,i])     P, Q packed, nowhere both 1: signs with a gate
//
// Signs that lie along v (core/operands.h) come transposed.
//
// The method of the Four Russians (Arlazarov et al. 1970): for four consecutive i the 16 possible sums +-a[i] +-a[i+1]
// +-a[i+2] +-a[i+3] are tabulated, one 64-byte entry for a tile of r; every column v then costs one look-up and one
// addition for four terms. The tables of 64 consecutive i fill 16 KiB of the first-level cache. uint8 terms are summed
// in int16, which holds 64 of them, and widened into int32: exact. Bound by one load and one addition a vector:
// a quarter of the additions that masks would take, an eighth with uint8.
// The order of summation does not depend on how the work is shared out.
#include <cstring>
#include <type_traits>

#include "cpu/simd.h"
#include "cpu/tables.h"

namespace engram::cpu::ENGRAM_ISA {

namespace {

constexpr int kSigns = 4;                                      // in a look-up
constexpr int kEntries = 1 << kSigns;                          // in the table of a group of four
constexpr int kEntryBytes = 64;                                // a tile of r
constexpr int kGroups = static_cast<int>(kWordBits) / kSigns;  // in a word
constexpr int kVectors = kEntryBytes / kVectorBytes;           // in an entry
constexpr int kIndexShift = 6;                                 // log2 kEntryBytes
constexpr uint64_t kIndexMask = uint64_t{kEntries - 1} << kIndexShift;

template <typename T>
using Vector [[gnu::vector_size(kVectorBytes)]] = T;

template <typename T>
struct Term;  // how numbers of type T are tabulated and summed
template <>
struct Term<float> {
  using Entry = float;
  using Sum = float;
};
template <>
struct Term<uint8_t> {
  using Entry = int16_t;
  using Sum = int32_t;
};

template <typename T>
constexpr int kTile = kEntryBytes / sizeof(typename Term<T>::Entry);  // rows r of a tile

// Columns that share a table: 64 KiB of sums, on the stack.
template <typename T>
constexpr int64_t kColumnBlock = 65536 / (kTile<T> * sizeof(typename Term<T>::Sum));

template <typename T>
ENGRAM_INLINE Vector<T> load_vector(const void* p) {
  Vector<T> v;
  memcpy(&v, p, sizeof v);
  return v;
}

template <typename T>
ENGRAM_INLINE void store_vector(void* p, Vector<T> v) {
  memcpy(p, &v, sizeof v);
}

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

// The 16 sums of each group of four terms: of the terms with their sign, or with Subset of those whose bit is 1.
template <typename T, bool Subset>
void tabulate(const typename Term<T>::Entry (*terms)[kTile<T>], char* table) {
  using Entry = typename Term<T>::Entry;
  for (int group = 0; group < kGroups; ++group, terms += kSigns, table += kEntries * kEntryBytes) {
    for (int v = 0; v < kVectors; ++v) {
      Vector<Entry> term[kSigns], low[4], high[4];
      for (int i = 0; i < kSigns; ++i)
        term[i] = load_vector<Entry>(reinterpret_cast<const char*>(terms[i]) + v * kVectorBytes);
      const Vector<Entry> zero{};
      for (int b = 0; b < 4; ++b) {
        low[b] = (b & 1 ? term[0] : Subset ? zero : -term[0]) + (b & 2 ? term[1] : Subset ? zero : -term[1]);
        high[b] = (b & 1 ? term[2] : Subset ? zero : -term[2]) + (b & 2 ? term[3] : Subset ? zero : -term[3]);
      }
      for (int b = 0; b < kEntries; ++b)
        store_vector<Entry>(table + b * kEntryBytes + v * kVectorBytes, low[b & 3] + high[b >> 2]);
    }
  }
}

// The index of the first group comes to lie at kIndexShift, that of the next one kSigns bits higher.
ENGRAM_INLINE uint64_t indices_of(uint64_t word) { return word << kIndexShift | word >> (kWordBits - kIndexShift); }
ENGRAM_INLINE uint64_t next_index(uint64_t indices) { return indices >> kSigns | indices << (kWordBits - kSigns); }

// Adds to (first: stores in) sums[c][..] the entries of Columns columns, which words plus[at + c * words] choose.
template <typename T, int Columns, bool Subset>
ENGRAM_INLINE void look_up(const char* table, int groups, const uint64_t* plus, const uint64_t* minus, int64_t at,
                           int64_t words, bool first, typename Term<T>::Sum (*sums)[kTile<T>]) {
  using Entry = typename Term<T>::Entry;
  using Sum = typename Term<T>::Sum;
  Vector<Entry> acc[Columns][kVectors];
  uint64_t added[Columns], subtracted[Columns];
  for (int c = 0; c < Columns; ++c) {
    added[c] = indices_of(plus[at + c * words]);
    if constexpr (Subset) subtracted[c] = indices_of(minus[at + c * words]);
    for (int v = 0; v < kVectors; ++v) acc[c][v] = Vector<Entry>{};
  }
  for (int group = 0; group < groups; ++group, table += kEntries * kEntryBytes) {
#pragma GCC unroll 8
    for (int c = 0; c < Columns; ++c) {
      const char* entry = table + (added[c] & kIndexMask);
      added[c] = next_index(added[c]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[c][v] += load_vector<Entry>(entry + v * kVectorBytes);
      if constexpr (Subset) {
        const char* other = table + (subtracted[c] & kIndexMask);
        subtracted[c] = next_index(subtracted[c]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) acc[c][v] -= load_vector<Entry>(other + v * kVectorBytes);
      }
    }
  }
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
        tabulate<T, Subset>(terms, table);
        const int groups = static_cast<int>((smaller(kWordBits, p.I - first) + kSigns - 1) / kSigns);
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
