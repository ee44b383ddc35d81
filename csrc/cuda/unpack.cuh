// unpack_signs: out = +1 or -1 of each unit, as a bit pattern of 1, 2, 4 or 8 bytes
//
//   bits  [rows, words]        out  [rows, K]
//
// A thread writes 16 bytes, 2 to 16 units of one row, where K is a multiple of those; else one unit. Bound by memory:
// the bytes written.
#pragma once

#include "cuda/warp.cuh"

namespace engram::cuda {

template <typename Number, int kUnits>
struct alignas(kUnits * sizeof(Number)) Numbers {
  Number of[kUnits];
};

template <typename Number, int kUnits>
__global__ void __launch_bounds__(kBlock) unpack_kernel(UnpackSigns p) {
  const int64_t pieces = p.K / kUnits, step = static_cast<int64_t>(gridDim.x) * kBlock;
  const auto plus = static_cast<Number>(p.plus), minus = static_cast<Number>(p.minus);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x; i < p.rows * pieces; i += step) {
    const int64_t row = i / pieces, unit = i % pieces * kUnits;
    const uint32_t word = words32(p.bits + row * p.words)[unit / 32] >> unit % 32;
    Numbers<Number, kUnits> numbers;
#pragma unroll
    for (int j = 0; j < kUnits; ++j) numbers.of[j] = word >> j & 1 ? plus : minus;
    reinterpret_cast<Numbers<Number, kUnits>*>(p.out)[i] = numbers;
  }
}

template <typename Number>
cudaError_t launch_unpack(const UnpackSigns& p, cudaStream_t stream) {
  constexpr int kUnits = 16 / sizeof(Number);
  const bool aligned = p.K % kUnits == 0 && reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
  const int64_t pieces = p.rows * (aligned ? p.K / kUnits : p.K);
  if (pieces == 0) return cudaSuccess;
  const auto kernel = aligned ? unpack_kernel<Number, kUnits> : unpack_kernel<Number, 1>;
  ENGRAM_LAUNCH(kernel, blocks_for(ceil_div(pieces, kWarp)), kBlock, stream, p);
  return cudaGetLastError();
}

inline cudaError_t unpack_signs(const UnpackSigns& p, cudaStream_t stream) {
  switch (p.size) {
    case 1:
      return launch_unpack<uint8_t>(p, stream);
    case 2:
      return launch_unpack<uint16_t>(p, stream);
    case 4:
      return launch_unpack<uint32_t>(p, stream);
    default:
      return launch_unpack<uint64_t>(p, stream);
  }
}

}  // namespace engram::cuda
