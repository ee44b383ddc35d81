// sign_product: every product of real numbers with a whole sign matrix, four signs a look-up.
//
//   y[v,r] = sum_i s(B[r,i]) D[i,v]             B [R, words] packed signs, D [I, V] float or uint8
//   y[v,r] = sum_i (P[r,i] - Q[r,i]) D[i,v]     P, Q packed, nowhere both 1: signs with a gate
//
//   sign_matmul        a @ s(W)      r = unit k, i = output n, v = sample, B = s(W) transposed
//   sign_matmul_t      x @ s(W)^T    r = output n, i = unit k, v = sample, B = s(W)
//   gated_weight_grad  d^T (g s(x))  r = unit k, i = sample, v = output n, B or P, Q = bits of x transposed
//
// The method of the Four Russians (Arlazarov et al. 1970): for four consecutive i the 16 possible sums +-D[i] +-D[i+1]
// +-D[i+2] +-D[i+3] are tabulated, one 64-byte entry for a tile of v; every row r then costs one look-up and one
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
constexpr int kEntryBytes = 64;                                // a tile of v
constexpr int kGroups = static_cast<int>(kWordBits) / kSigns;  // in a word
constexpr int kVectors = kEntryBytes / kVectorBytes;           // in an entry
constexpr int kIndexShift = 6;                                 // log2 kEntryBytes
constexpr uint64_t kIndexMask = uint64_t{kEntries - 1} << kIndexShift;
#if defined(ENGRAM_ISA_AVX512)
constexpr int kRows = 8;  // accumulators enough to hide the latency of an addition
#else
constexpr int kRows = 4;
#endif

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
constexpr int kTile = kEntryBytes / sizeof(typename Term<T>::Entry);  // columns v of a tile

// Rows that share a table: 64 KiB of sums, on the stack.
template <typename T>
constexpr int64_t kRowBlock = 65536 / (kTile<T> * sizeof(typename Term<T>::Sum));

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

// terms[i][j] = D[first + i, v + j], zero outside D.
template <typename T>
void gather(const SignProduct& p, int64_t first, int64_t v, typename Term<T>::Entry (*terms)[kTile<T>]) {
  const int64_t used = smaller(kWordBits, p.I - first), columns = smaller<int64_t>(kTile<T>, p.V - v);
  const T* d = static_cast<const T*>(p.d) + first * p.i_stride + v * p.v_stride;
  if (used < kWordBits || columns < kTile<T>) memset(terms, 0, kWordBits * sizeof *terms);
  if (p.v_stride == 1) {
    for (int64_t i = 0; i < used; ++i)
      for (int64_t j = 0; j < columns; ++j) terms[i][j] = d[i * p.i_stride + j];
    return;
  }
  if constexpr (std::is_same_v<T, float>) {
    if (p.i_stride == 1) return write_transposed(d, p.v_stride, columns, used, &terms[0][0], kTile<T>);
  }
  for (int64_t j = 0; j < columns; ++j)
    for (int64_t i = 0; i < used; ++i) terms[i][j] = d[i * p.i_stride + j * p.v_stride];
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

// Adds to (first: stores in) sums[r][..] the entries of Rows rows, which words plus[at + r * words] choose.
template <typename T, int Rows, bool Subset>
ENGRAM_INLINE void look_up(const char* table, int groups, const uint64_t* plus, const uint64_t* minus, int64_t at,
                           int64_t words, bool first, typename Term<T>::Sum (*sums)[kTile<T>]) {
  using Entry = typename Term<T>::Entry;
  using Sum = typename Term<T>::Sum;
  Vector<Entry> acc[Rows][kVectors];
  uint64_t added[Rows], subtracted[Rows];
  for (int r = 0; r < Rows; ++r) {
    added[r] = indices_of(plus[at + r * words]);
    if constexpr (Subset) subtracted[r] = indices_of(minus[at + r * words]);
    for (int v = 0; v < kVectors; ++v) acc[r][v] = Vector<Entry>{};
  }
  for (int group = 0; group < groups; ++group, table += kEntries * kEntryBytes) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const char* entry = table + (added[r] & kIndexMask);
      added[r] = next_index(added[r]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[r][v] += load_vector<Entry>(entry + v * kVectorBytes);
      if constexpr (Subset) {
        const char* other = table + (subtracted[r] & kIndexMask);
        subtracted[r] = next_index(subtracted[r]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) acc[r][v] -= load_vector<Entry>(other + v * kVectorBytes);
      }
    }
  }
  for (int r = 0; r < Rows; ++r) {
    if constexpr (sizeof(Entry) == sizeof(Sum)) {
      for (int v = 0; v < kVectors; ++v) {
        char* sum = reinterpret_cast<char*>(sums[r]) + v * kVectorBytes;
        store_vector<Sum>(sum, first ? acc[r][v] : load_vector<Sum>(sum) + acc[r][v]);
      }
    } else {
      Entry narrow[kTile<T>];
      for (int v = 0; v < kVectors; ++v)
        store_vector<Entry>(reinterpret_cast<char*>(narrow) + v * kVectorBytes, acc[r][v]);
      for (int j = 0; j < kTile<T>; ++j) sums[r][j] = (first ? 0 : sums[r][j]) + narrow[j];
    }
  }
}

template <typename T, bool Subset>
void product(const SignProduct& p, int64_t v_begin, int64_t v_end, int64_t r_begin, int64_t r_end) {
  alignas(64) typename Term<T>::Entry terms[kWordBits][kTile<T>];
  alignas(64) char table[kGroups * kEntries * kEntryBytes];
  alignas(64) typename Term<T>::Sum sums[kRowBlock<T>][kTile<T>];
  for (int64_t v = v_begin; v < v_end; v += kTile<T>) {
    for (int64_t r0 = r_begin; r0 < r_end; r0 += kRowBlock<T>) {
      const int64_t rows = smaller(kRowBlock<T>, r_end - r0);
      if (p.I == 0) memset(sums, 0, static_cast<size_t>(rows) * sizeof *sums);
      for (int64_t first = 0; first < p.I; first += kWordBits) {
        gather<T>(p, first, v, terms);
        tabulate<T, Subset>(terms, table);
        const int groups = static_cast<int>((smaller(kWordBits, p.I - first) + kSigns - 1) / kSigns);
        const uint64_t* plus = p.plus + r0 * p.words + first / kWordBits;
        const uint64_t* minus = Subset ? p.minus + r0 * p.words + first / kWordBits : nullptr;
        int64_t r = 0;
        for (; r + kRows <= rows; r += kRows)
          look_up<T, kRows, Subset>(table, groups, plus, minus, r * p.words, p.words, first == 0, sums + r);
        for (; r < rows; ++r)
          look_up<T, 1, Subset>(table, groups, plus, minus, r * p.words, p.words, first == 0, sums + r);
      }
      using Sum = typename Term<T>::Sum;
      write_transposed(&sums[0][0], kTile<T>, rows, smaller<int64_t>(kTile<T>, p.V - v),
                       static_cast<Sum*>(p.y) + v * p.y_stride + r0, p.y_stride);
    }
  }
}

}  // namespace

void sign_product(const SignProduct& p, int64_t v_begin, int64_t v_end, int64_t r_begin, int64_t r_end) {
  if (p.exact)
    product<uint8_t, false>(p, v_begin, v_end, r_begin, r_end);
  else if (p.minus == nullptr)
    product<float, false>(p, v_begin, v_end, r_begin, r_end);
  else
    product<float, true>(p, v_begin, v_end, r_begin, r_end);
}

}  // namespace engram::cpu::ENGRAM_ISA
