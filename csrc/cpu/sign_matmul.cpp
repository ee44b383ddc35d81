// Products of real numbers with sign matrices; a sign costs an addition under a mask, never a multiplication.
//
//   sign_matmul    y[m,k] = sum_n a[m,n] s(W[n,k]) = 2 sum_{n: bit 1} a[m,n] - sum_n a[m,n]     a [M, N], y [M, K]
//   sign_matmul_t  y[m,n] = sum_k a[m,k] s(W[n,k])                                              a [M, K], y [M, N]
//
// sign_matmul: a tile of kRows samples x 64 columns (one word of a row of W). The word's column of W is first gathered
// into a block of kBlock words, since a walk down the rows would touch one cache line a word. Each word gives the lane
// masks of all samples of the tile.
// sign_matmul_t: a tile of samples x rows of W; lanes run along k and are summed at the end.
// Both bound by one masked addition a vector; the order of summation does not depend on how the work is shared out.
#include "cpu/simd.h"
#include "cpu/tables.h"

namespace engram::cpu::ENGRAM_ISA {

namespace {

constexpr int64_t kBlock = 1024;
constexpr int kVectors = static_cast<int>(kWordBits) / kLanes;  // vectors in the 64 columns of a word
#if defined(ENGRAM_ISA_AVX512)
constexpr int kRows = 6, kDotRows = 4, kDotColumns = 6;
constexpr int kTileVectors = kVectors;
#else
constexpr int kRows = 4, kDotRows = 4, kDotColumns = 2;
constexpr int kTileVectors = 2;
#endif

// Adds the contribution of `block` words to y[m + r, 0 .. 64) held in `sums`.
template <int Rows>
ENGRAM_INLINE void accumulate(const float* a, int64_t a_stride, const uint64_t* column, int64_t block,
                              float sums[][kWordBits]) {
  for (int v0 = 0; v0 < kVectors; v0 += kTileVectors) {
    Floats acc[Rows][kTileVectors];
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < kTileVectors; ++v) acc[r][v] = zero();
    for (int64_t n = 0; n < block; ++n) {
      Mask mask[kTileVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) mask[v] = mask_from(column[n], v0 + v);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const Floats value = all(a[r * a_stride + n]);
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) acc[r][v] = add_where(acc[r][v], mask[v], value);
      }
    }
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < kTileVectors; ++v) {
        float* sum = sums[r] + (v0 + v) * kLanes;
        store(sum, add(load(sum), acc[r][v]));
      }
  }
}

template <int Rows>
void columns_of_word(const SignMatmul& p, int64_t m, int64_t word) {
  uint64_t column[kBlock];
  alignas(64) float sums[Rows][kWordBits] = {};
  for (int64_t n = 0; n < p.N; n += kBlock) {
    const int64_t block = smaller(kBlock, p.N - n);
    for (int64_t i = 0; i < block; ++i) column[i] = p.w[(n + i) * p.words + word];
    accumulate<Rows>(p.a + m * p.N + n, p.N, column, block, sums);
  }
  const int64_t columns = smaller(kWordBits, p.K - word * kWordBits);
  for (int r = 0; r < Rows; ++r) {
    float* y = p.y + (m + r) * p.K + word * kWordBits;
    for (int64_t i = 0; i < columns; ++i) y[i] = 2.0f * sums[r][i] - p.a_sum[m + r];
  }
}

template <int Rows>
void columns_remainder(const SignMatmul& p, int64_t rows, int64_t m, int64_t word) {
  if constexpr (Rows > 0) {
    if (rows == Rows)
      columns_of_word<Rows>(p, m, word);
    else
      columns_remainder<Rows - 1>(p, rows, m, word);
  }
}

template <int Rows, int Columns>
void dots(const SignMatmul& p, int64_t m, int64_t n) {
  const float* a = p.a + m * p.K;
  const uint64_t* w = p.w + n * p.words;
  Floats acc[Rows][Columns];
  for (int r = 0; r < Rows; ++r)
    for (int c = 0; c < Columns; ++c) acc[r][c] = zero();
  int64_t k = 0;
  for (; k + kLanes <= p.K; k += kLanes) {
    Floats value[Rows];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) value[r] = load(a + r * p.K + k);
#pragma GCC unroll 8
    for (int c = 0; c < Columns; ++c) {
      const Mask mask = mask_at(w + c * p.words, k);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) acc[r][c] = add_where(acc[r][c], mask, value[r]);
    }
  }
  if (k < p.K) {
    for (int r = 0; r < Rows; ++r) {
      float tail[kLanes] = {};
      for (int64_t i = k; i < p.K; ++i) tail[i - k] = a[r * p.K + i];
      const Floats value = load(tail);
      for (int c = 0; c < Columns; ++c) acc[r][c] = add_where(acc[r][c], mask_at(w + c * p.words, k), value);
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int c = 0; c < Columns; ++c) p.y[(m + r) * p.N + n + c] = 2.0f * total(acc[r][c]) - p.a_sum[m + r];
}

template <int Columns>
void dot_columns(const SignMatmul& p, int64_t m_begin, int64_t m_end, int64_t n) {
  int64_t m = m_begin;
  for (; m + kDotRows <= m_end; m += kDotRows) dots<kDotRows, Columns>(p, m, n);
  for (; m < m_end; ++m) dots<1, Columns>(p, m, n);
}

}  // namespace

void sign_matmul(const SignMatmul& p, int64_t m_begin, int64_t m_end, int64_t word_begin, int64_t word_end) {
  for (int64_t word = word_begin; word < word_end; ++word) {
    int64_t m = m_begin;
    for (; m + kRows <= m_end; m += kRows) columns_of_word<kRows>(p, m, word);
    columns_remainder<kRows - 1>(p, m_end - m, m, word);
  }
}

void sign_matmul_t(const SignMatmul& p, int64_t m_begin, int64_t m_end, int64_t n_begin, int64_t n_end) {
  int64_t n = n_begin;
  for (; n + kDotColumns <= n_end; n += kDotColumns) dot_columns<kDotColumns>(p, m_begin, m_end, n);
  for (; n < n_end; ++n) dot_columns<1>(p, m_begin, m_end, n);
}

}  // namespace engram::cpu::ENGRAM_ISA
