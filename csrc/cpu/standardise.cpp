// standardise:       z[m,n] = (y[m,n] - mean[m]) * reciprocal[m],  reciprocal = 1 / sqrt(variance + eps)
// standardise_grad:  dy[m,n] = (d[m,n] - mean(d[m]) - z[m,n] mean(d[m] z[m])) * reciprocal[m]
//
//   y, z, d, dy  [M, N] float32          moments  [M, 2] float64: mean, reciprocal
//
// Every instruction set gives the same bits. Sums are float64, in the order of kPartialSums interleaved partial sums
// (core/operands.h), which lie in registers; products of two float32 numbers are exact there; the rest is float32,
// rounded after each operation. A row is read from memory once, and from the first- or second-level cache by the passes
// after the first: three forward, two backward. Bound by the conversions to float64, two a pair of vectors.
#include <cmath>
#include <cstring>

#include "cpu/simd.h"
#include "cpu/tables.h"

namespace engram::cpu::ENGRAM_ISA {

namespace {

using Doubles = double __attribute__((vector_size(kVectorBytes), aligned(kVectorBytes)));
using Singles = float __attribute__((vector_size(kVectorBytes / 2), aligned(kVectorBytes / 2)));  // as many
constexpr int kDoubles = kVectorBytes / 8, kSums = kPartialSums / kDoubles;

ENGRAM_INLINE Singles read(const float* p) {
  Singles v;
  memcpy(&v, p, sizeof v);
  return v;
}
ENGRAM_INLINE Doubles widen(Singles v) { return __builtin_convertvector(v, Doubles); }
ENGRAM_INLINE double widen(float v) { return v; }

// The mean of term(a[i], b[i]), a float64 number or a vector of them.
template <typename Term>
ENGRAM_INLINE double mean_of(const float* a, const float* b, int64_t n, const Term& term) {
  Doubles sums[kSums] = {};
  int64_t i = 0;
  for (; i + kPartialSums <= n; i += kPartialSums) {
#pragma GCC unroll 16
    for (int v = 0; v < kSums; ++v) sums[v] += term(read(a + i + v * kDoubles), read(b + i + v * kDoubles));
  }
  double partial[kPartialSums];
  memcpy(partial, sums, sizeof partial);
  for (int j = 0; i + j < n; ++j) partial[j] += term(a[i + j], b[i + j]);
  for (int half = kPartialSums / 2; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) partial[j] += partial[j + half];
  return partial[0] / static_cast<double>(n);
}

// A float64 number as the sum of two float32 ones.
struct Split {
  explicit Split(double value)
      : high(static_cast<float>(value)), low(static_cast<float>(value - static_cast<double>(high))) {}
  float high, low;
};

}  // namespace

void standardise(const Standardise& p, Range rows) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const float* y = p.y + row * p.N;
    const double mean = mean_of(y, y, p.N, [](auto v, auto) { return widen(v); });
    const Split m(mean);
    const double variance = mean_of(y, y, p.N, [m](auto v, auto) {
      const auto centred = widen((v - m.high) - m.low);
      return centred * centred;
    });
    const auto reciprocal = static_cast<float>(1.0 / std::sqrt(variance + p.eps));
    float* z = p.z + row * p.N;
    for (int64_t i = 0; i < p.N; ++i) z[i] = ((y[i] - m.high) - m.low) * reciprocal;
    p.moments[2 * row] = mean;
    p.moments[2 * row + 1] = reciprocal;
  }
}

void standardise_grad(const StandardiseGrad& p, Range rows) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const float *d = p.d + row * p.N, *y = p.y + row * p.N;
    const Split m(p.moments[2 * row]);
    const auto reciprocal = static_cast<float>(p.moments[2 * row + 1]);
    const auto mean_d = static_cast<float>(mean_of(d, d, p.N, [](auto v, auto) { return widen(v); }));
    const auto mean_dz = static_cast<float>(mean_of(
        d, y, p.N, [m, reciprocal](auto v, auto x) { return widen(v) * widen(((x - m.high) - m.low) * reciprocal); }));
    float* dy = p.dy + row * p.N;
    for (int64_t i = 0; i < p.N; ++i)
      dy[i] = ((d[i] - mean_d) - (((y[i] - m.high) - m.low) * reciprocal) * mean_dz) * reciprocal;
  }
}

}  // namespace engram::cpu::ENGRAM_ISA
