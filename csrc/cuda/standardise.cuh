// standardise:       z[m,n] = (y[m,n] - mean[m]) * reciprocal[m],  reciprocal = 1 / sqrt(variance + eps)
// standardise_grad:  dy[m,n] = (d[m,n] - mean(d[m]) - z[m,n] mean(d[m] z[m])) * reciprocal[m]
//
//   y, z, d, dy  [M, N] float32          moments  [M, 2] float64: mean, reciprocal
//
// A warp takes a row; a lane has one of the kPartialSums partial sums, so that their order, and every bit, is that of
// the CPU. This file must be compiled without contraction to fused multiply-add. Bound by memory where there are rows
// for all warps: a row comes from the caches after its first pass.
#pragma once

#include "cuda/warp.cuh"

namespace engram::cuda {

static_assert(kPartialSums == kWarp, "a lane has a partial sum");

__device__ __forceinline__ float centre(float y, double mean) {
  const float high = static_cast<float>(mean);
  return (y - high) - static_cast<float>(mean - static_cast<double>(high));
}

// The mean of term(n) over a row, in all lanes.
template <typename Term>
__device__ __forceinline__ double mean_of_row(int64_t n, const Term& term) {
  double sum = 0;
  for (int64_t i = lane_id(); i < n; i += kWarp) sum += term(i);
#pragma unroll
  for (int half = kWarp / 2; half > 0; half /= 2) sum += __shfl_xor_sync(kAllLanes, sum, half);
  return sum / static_cast<double>(n);
}

__global__ void __launch_bounds__(kBlock) standardise_kernel(Standardise p) {
  for (int64_t row = first_piece(); row < p.M; row += piece_step()) {
    const float* y = p.y + row * p.N;
    const double mean = mean_of_row(p.N, [&](int64_t i) { return static_cast<double>(y[i]); });
    const double variance = mean_of_row(p.N, [&](int64_t i) {
      const double centred = centre(y[i], mean);
      return centred * centred;
    });
    const float reciprocal = static_cast<float>(1.0 / sqrt(variance + p.eps));
    float* z = p.z + row * p.N;
    for (int64_t i = lane_id(); i < p.N; i += kWarp) z[i] = centre(y[i], mean) * reciprocal;
    if (lane_id() < 2) p.moments[2 * row + lane_id()] = lane_id() == 0 ? mean : static_cast<double>(reciprocal);
  }
}

__global__ void __launch_bounds__(kBlock) standardise_grad_kernel(StandardiseGrad p) {
  for (int64_t row = first_piece(); row < p.M; row += piece_step()) {
    const float *d = p.d + row * p.N, *y = p.y + row * p.N;
    const double mean = p.moments[2 * row];
    const float reciprocal = static_cast<float>(p.moments[2 * row + 1]);
    const float mean_d = static_cast<float>(mean_of_row(p.N, [&](int64_t i) { return static_cast<double>(d[i]); }));
    const float mean_dz = static_cast<float>(mean_of_row(p.N, [&](int64_t i) {
      return static_cast<double>(d[i]) * static_cast<double>(centre(y[i], mean) * reciprocal);
    }));
    float* dy = p.dy + row * p.N;
    for (int64_t i = lane_id(); i < p.N; i += kWarp)
      dy[i] = ((d[i] - mean_d) - (centre(y[i], mean) * reciprocal) * mean_dz) * reciprocal;
  }
}

inline cudaError_t standardise(const Standardise& p, cudaStream_t stream) {
  if (p.M == 0) return cudaSuccess;
  ENGRAM_LAUNCH(standardise_kernel, blocks_for(p.M), kBlock, stream, p);
  return cudaGetLastError();
}

inline cudaError_t standardise_grad(const StandardiseGrad& p, cudaStream_t stream) {
  if (p.M == 0) return cudaSuccess;
  ENGRAM_LAUNCH(standardise_grad_kernel, blocks_for(p.M), kBlock, stream, p);
  return cudaGetLastError();
}

}  // namespace engram::cuda
