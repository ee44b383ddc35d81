// The Cholesky factor of a positive definite matrix, and solutions with it, in float64.
#pragma once

#include <cmath>
#include <cstdint>

namespace engram::runtime {

// A [n, n] = R^T R with R upper triangular, which takes its upper half's place. False if A is not positive definite.
//
// For each panel of rows, R[p, j] = (A[p, j] - sum over k < p of R[k, p] R[k, j]) / R[p, p]; n^3 / 3 multiply-adds. The
// sums over the rows above the panel are made for some columns at a time, which stay in the cache, and rows are added
// whole, so that the compiler makes vectors of them without a change of the order of any sum.
inline bool factorise(double* a, int64_t n) {
  constexpr int64_t kRows = 64, kColumns = 256;
  const auto subtract = [&](int64_t k, int64_t p, int64_t begin, int64_t end) {
    const double factor = a[k * n + p];
    double* __restrict__ row = a + p * n;
    const double* __restrict__ above = a + k * n;
    for (int64_t j = begin; j < end; ++j) row[j] -= factor * above[j];
  };
  const auto least = [](int64_t x, int64_t y) { return x < y ? x : y; };
  for (int64_t first = 0; first < n; first += kRows) {
    const int64_t last = least(first + kRows, n);
    for (int64_t begin = first; begin < n; begin += kColumns)
      for (int64_t k = 0; k < first; ++k)
        for (int64_t p = first; p < last; ++p) subtract(k, p, begin, least(begin + kColumns, n));
    for (int64_t p = first; p < last; ++p) {
      for (int64_t k = first; k < p; ++k) subtract(k, p, p, n);
      if (!(a[p * n + p] > 0)) return false;
      const double root = std::sqrt(a[p * n + p]);
      for (int64_t j = p; j < n; ++j) a[p * n + j] /= root;
    }
  }
  return true;
}

// Solves R^T R x = b in place of b [n].
inline void solve(const double* r, int64_t n, double* b) {
  for (int64_t k = 0; k < n; ++k) {
    b[k] /= r[k * n + k];
    for (int64_t j = k + 1; j < n; ++j) b[j] -= r[k * n + j] * b[k];
  }
  for (int64_t k = n - 1; k >= 0; --k) {
    double sum = b[k];
    for (int64_t j = k + 1; j < n; ++j) sum -= r[k * n + j] * b[j];
    b[k] = sum / r[k * n + k];
  }
}

}  // namespace engram::runtime
