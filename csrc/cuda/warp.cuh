// What the lanes of a warp do together.
#pragma once

#include "core/bits.h"
#include "cuda/device.cuh"
#include "cuda/kernels.h"

namespace engram::cuda {

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x) / kWarp; }

// Words of 32 bits: packed rows are read and written by these and by 16-byte pieces.
__device__ __forceinline__ const uint32_t* words32(const uint64_t* bits) {
  return reinterpret_cast<const uint32_t*>(bits);
}

// The four bits of each lane side by side: lane l gets the 32-bit word of lanes 8 (l / 8) .. 8 (l / 8) + 7, so that a
// warp's 128 units are one 16-byte piece of a packed row.
__device__ __forceinline__ uint32_t join_nibbles(uint32_t nibble) {
  uint32_t word = nibble << 4 * (lane_id() % 8);
  word |= __shfl_xor_sync(kAllLanes, word, 1);
  word |= __shfl_xor_sync(kAllLanes, word, 2);
  word |= __shfl_xor_sync(kAllLanes, word, 4);
  return word;
}

// Writes a 16-byte piece of a packed row from what join_nibbles gave.
__device__ __forceinline__ void store_piece(uint64_t* piece, uint32_t word) {
  if (lane_id() % 8 == 0) reinterpret_cast<uint32_t*>(piece)[lane_id() / 8] = word;
}

// Warps for `pieces` independent pieces of work, each by one warp, in blocks of kBlock threads.
constexpr int kBlock = 256;
constexpr int64_t kMostBlocks = 1 << 16;  // beyond, warps take several pieces
inline unsigned blocks_for(int64_t pieces) {
  const int64_t blocks = ceil_div(pieces, kBlock / kWarp);
  return static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks);
}
__device__ __forceinline__ int64_t first_piece() {
  return static_cast<int64_t>(blockIdx.x) * (kBlock / kWarp) + warp_id();
}
__device__ __forceinline__ int64_t piece_step() { return static_cast<int64_t>(gridDim.x) * (kBlock / kWarp); }

}  // namespace engram::cuda
