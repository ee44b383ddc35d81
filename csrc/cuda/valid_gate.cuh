// valid_gate: out = gate & valid bits, or the valid bits where there is no gate
//
//   gate  [rows, words] or null      out  [rows, words] (core/bits.h)
//
// A product within such a gate does not see what lies in the padding of x, w and gate. A thread makes a word. Bound by
// the launch: a gate has few rows.
#pragma once

#include "cuda/warp.cuh"

namespace engram::cuda {

__global__ void __launch_bounds__(kBlock) valid_gate_kernel(ValidGate p) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kBlock;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x; i < p.rows * p.words; i += step)
    p.out[i] = valid_bits(i % p.words, p.K) & (p.gate == nullptr ? ~uint64_t{0} : p.gate[i]);
}

inline cudaError_t valid_gate(const ValidGate& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  ENGRAM_LAUNCH(valid_gate_kernel, blocks_for(ceil_div(p.rows * p.words, kWarp)), kBlock, stream, p);
  return cudaGetLastError();
}

}  // namespace engram::cuda
