// The gradient of hidden weights whose input is real-valued.
//
//   real_weight_grad   dW[n,k] = sum_m d[m,n] x[m,k]     d [M, N], x [M, K], dW [N, K]
//
// An outer product a sample, summed in registers: kOuterRows outputs by kOuterVectors vectors of units, over
// kSampleChunk samples at a time. A panel of units of x stays in the first-level cache while it meets all outputs of a
// block. The block's part of d is copied once, in the order in which it is read. Bound by multiply-adds.
#include "cpu/simd.h"
#include "cpu/tables.h"

namespace engram::cpu::ENGRAM_ISA {

namespace {

constexpr int kOuterVectors = 3;
constexpr int kPanel = kOuterVectors * kLanes;  // units
constexpr int64_t kOutputs = 64;                // of a block
static_assert(kOutputs % kOuterRows == 0);

// Sums over `samples` of d [samples, kOuterRows] times x, of kVectors vectors of units; added to `out` to go on.
template <int kVectors>
ENGRAM_INLINE void add_outer_products(const float* d, const float* x, int64_t x_stride, int64_t samples, bool go_on,
                                      float* out, int64_t out_stride) {
  Floats sums[kOuterRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kOuterRows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) sums[r][v] = go_on ? load(out + r * out_stride + v * kLanes) : zero();
  for (int64_t m = 0; m < samples; ++m) {
    Floats units[kVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) units[v] = load(x + m * x_stride + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kOuterRows; ++r) {
      const Floats output = all(d[m * kOuterRows + r]);
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) sums[r][v] = add_product(sums[r][v], output, units[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kOuterRows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) store(out + r * out_stride + v * kLanes, sums[r][v]);
}

void add_panel(int vectors, const float* d, const float* x, int64_t x_stride, int64_t samples, bool go_on, float* out,
               int64_t out_stride) {
  static_assert(kOuterVectors == 3);
  if (vectors == 1) return add_outer_products<1>(d, x, x_stride, samples, go_on, out, out_stride);
  if (vectors == 2) return add_outer_products<2>(d, x, x_stride, samples, go_on, out, out_stride);
  add_outer_products<3>(d, x, x_stride, samples, go_on, out, out_stride);
}

}  // namespace

void real_weight_grad(const RealWeightGrad& p, Block part) {
  alignas(64) float d[kOutputs * kSampleChunk];      // by tile of kOuterRows outputs and sample
  alignas(64) float x[kSampleChunk * kPanel];        // a panel whose units do not fill their vectors
  alignas(64) float tile[kOuterRows * kPanel] = {};  // sums of such a panel, or of too few outputs
  for (int64_t n = part.rows.begin; n < part.rows.end; n += kOutputs) {
    const int64_t outputs = smaller(kOutputs, part.rows.end - n);
    int64_t first = 0;
    do {  // at least once: an empty batch has a gradient of zeros
      const int64_t samples = smaller(kSampleChunk, p.M - first);
      for (int64_t r = 0; r < kOutputs; r += kOuterRows)
        for (int64_t m = 0; m < samples; ++m)
          for (int64_t i = 0; i < kOuterRows; ++i)
            d[r * kSampleChunk + m * kOuterRows + i] =
                r + i < outputs ? p.d[(first + m) * p.d_stride + n + r + i] : 0.0f;
      for (int64_t k = part.columns.begin; k < part.columns.end; k += kPanel) {
        const int64_t units = smaller<int64_t>(kPanel, part.columns.end - k);
        const int vectors = static_cast<int>((units + kLanes - 1) / kLanes);
        const bool whole = units % kLanes == 0;
        const float* from = p.x + first * p.K + k;
        if (!whole)
          for (int64_t m = 0; m < samples; ++m)
            for (int64_t u = 0; u < kPanel; ++u) x[m * kPanel + u] = u < units ? from[m * p.K + u] : 0.0f;
        for (int64_t r = 0; r < outputs; r += kOuterRows) {
          const int64_t rows = smaller<int64_t>(kOuterRows, outputs - r);
          float* to = p.dw + (n + r - part.rows.begin) * p.dw_stride + k - part.columns.begin;
          const bool direct = whole && rows == kOuterRows;
          if (!direct && first > 0)
            for (int64_t i = 0; i < rows; ++i)
              for (int64_t u = 0; u < units; ++u) tile[i * kPanel + u] = to[i * p.dw_stride + u];
          add_panel(vectors, d + r * kSampleChunk, whole ? from : x, whole ? p.K : kPanel, samples, first > 0,
                    direct ? to : tile, direct ? p.dw_stride : kPanel);
          if (!direct)
            for (int64_t i = 0; i < rows; ++i)
              for (int64_t u = 0; u < units; ++u) to[i * p.dw_stride + u] = tile[i * kPanel + u];
        }
      }
      first += kSampleChunk;
    } while (first < p.M);
  }
}

}  // namespace engram::cpu::ENGRAM_ISA
