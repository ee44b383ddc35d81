// sample_engram: recruits units, one gate row per sample
//
//   score  [M, K] float32        gate  [M, words]
//
//   bernoulli     recruited where the 32-bit draw is below rate * 2^32, independently
//   Gumbel-top-k  the `count` units of largest score / temperature + Gumbel draw; ties go to the lower index
//
// Draws and the order of keys are those of core/philox.h, so that every backend recruits the same units; this file must
// be compiled without contraction to fused multiply-add.
//
// Bernoulli: lane l of a warp draws units 4l .. 4l + 3 of a 16-byte piece with one Philox counter.
// Gumbel-top-k: a block takes a sample. It writes the keys to scratch (in the second-level cache), four units a thread,
// and finds the count-th largest digit by digit, 8 bits a pass, from a histogram in shared memory. Then each warp,
// knowing how many equal keys lie in the pieces before its own, writes a run of pieces. Bound by the arithmetic of the
// draws: about 60 integer multiply-adds and two logarithms for four units.
#pragma once

#include "core/philox.h"
#include "cuda/warp.cuh"

namespace engram::cuda {

// Of a sample, for the draws.
__device__ __forceinline__ uint64_t row_number(const SampleEngram& p, int64_t m) {
  return p.first_row + static_cast<uint64_t>(m) * p.row_step;
}

__global__ void __launch_bounds__(kBlock) bernoulli_kernel(SampleEngram p) {
  const int64_t pieces = p.words / 2;
  for (int64_t i = first_piece(); i < p.M * pieces; i += piece_step()) {
    const int64_t m = i / pieces, word = i % pieces * 2, unit = word * kWordBits + 4 * lane_id();
    const PhiloxDraws draws = philox(p.seed, static_cast<uint64_t>(unit / 4), row_number(p, m), p.offset);
    uint32_t nibble = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) nibble |= static_cast<uint32_t>(unit + j < p.K && draws.word[j] < p.threshold) << j;
    store_piece(p.gate + m * p.words + word, join_nibbles(nibble));
  }
}

constexpr int kWarps = kBlock / kWarp;
constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits;
static_assert(kDigits == kBlock, "a thread has a digit");

// keys[k] = ordered_key(score / temperature + gumbel) of one sample, and the histogram of their highest digits.
template <bool kAligned>
__device__ __forceinline__ void make_keys(const SampleEngram& p, int64_t m, uint32_t* keys, int* histogram) {
  const bool noisy = p.inverse_temperature >= 0.0f, scored = p.inverse_temperature != 0.0f;
  const float* score = p.score + m * p.K;
  bool nan = false;
  for (int64_t unit = 4 * static_cast<int64_t>(threadIdx.x); unit < p.K; unit += 4 * kBlock) {
    float value[4] = {};
    if (scored) {
      if constexpr (kAligned) {
        const float4 four = *reinterpret_cast<const float4*>(score + unit);
        value[0] = four.x, value[1] = four.y, value[2] = four.z, value[3] = four.w;
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (unit + j < p.K) value[j] = score[unit + j];
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) nan |= value[j] != value[j];
    }
    if (noisy) {
      const PhiloxDraws draws = philox(p.seed, static_cast<uint64_t>(unit / 4), row_number(p, m), p.offset);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float noise = gumbel(draws.word[j]);
        value[j] = scored ? value[j] * p.inverse_temperature + noise : noise;
      }
    }
    uint32_t key[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      key[j] = ordered_key(value[j]);
      if (unit + j < p.K) atomicAdd(&histogram[key[j] >> (32 - kDigitBits)], 1);
    }
    *reinterpret_cast<uint4*>(keys + unit) = make_uint4(key[0], key[1], key[2], key[3]);
  }
  if (nan) *p.nan = 1;
}

// The sum of `count` over all threads from the first to this one.
__device__ __forceinline__ int sum_up_to_thread(int count, int* of_warps) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int before = __shfl_up_sync(kAllLanes, count, step);
    if (lane_id() >= step) count += before;
  }
  if (lane_id() == kWarp - 1) of_warps[warp_id()] = count;
  __syncthreads();
  for (int warp = 0; warp < warp_id(); ++warp) count += of_warps[warp];
  return count;
}

template <bool kAligned>
__global__ void __launch_bounds__(kBlock) gumbel_top_k_kernel(SampleEngram p) {
  __shared__ int histogram[kDigits];
  __shared__ int of_warps[kWarps];
  __shared__ uint32_t found_digit;
  __shared__ int found_wanted;
  const int64_t m = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x), lane = lane_id();
  uint32_t* keys = p.keys + m * p.key_stride;

  // The count-th largest key: its digits from the highest on. `wanted` keys of those that share the digits found so far
  // are among the largest.
  uint32_t key_digits = 0;
  int wanted = static_cast<int>(p.count);
  for (int shift = 32 - kDigitBits; shift >= 0; shift -= kDigitBits) {
    histogram[thread] = 0;
    __syncthreads();
    if (shift == 32 - kDigitBits) {
      make_keys<kAligned>(p, m, keys, histogram);
    } else {
      for (int64_t unit = 4 * static_cast<int64_t>(thread); unit < p.K; unit += 4 * kBlock) {
        const uint4 four = *reinterpret_cast<const uint4*>(keys + unit);
        const uint32_t key[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (unit + j < p.K && key[j] >> (shift + kDigitBits) == key_digits)
            atomicAdd(&histogram[key[j] >> shift & (kDigits - 1)], 1);
      }
    }
    __syncthreads();
    const int digit = kDigits - 1 - thread, own = histogram[digit];  // from the largest digit down
    const int reached = sum_up_to_thread(own, of_warps);
    if (reached >= wanted && reached - own < wanted) {
      found_digit = static_cast<uint32_t>(digit);
      found_wanted = wanted - (reached - own);
    }
    __syncthreads();
    key_digits = key_digits << kDigitBits | found_digit;
    wanted = found_wanted;
  }
  const uint32_t threshold = key_digits;

  // Each warp writes a run of pieces; the first `wanted` of the keys equal to the threshold are recruited.
  const int64_t pieces = p.words / 2;
  const int64_t begin = pieces * warp_id() / kWarps, end = pieces * (warp_id() + 1) / kWarps;
  const uint32_t lanes_before = (1u << lane) - 1;
  int equal_in_run = 0;
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t unit = piece * kRowBits + 4 * lane;
    if (unit < p.K) {
      const uint4 four = *reinterpret_cast<const uint4*>(keys + unit);
      const uint32_t key[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) equal_in_run += unit + j < p.K && key[j] == threshold;
    }
  }
  int equal_before = sum_up_to_thread(equal_in_run, of_warps);
  equal_before = __shfl_sync(kAllLanes, equal_before - equal_in_run, 0);
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t unit = piece * kRowBits + 4 * lane;
    uint32_t key[4] = {};
    if (unit < p.K) {
      const uint4 four = *reinterpret_cast<const uint4*>(keys + unit);
      key[0] = four.x, key[1] = four.y, key[2] = four.z, key[3] = four.w;
    }
    int rank = equal_before, equal_in_piece = 0;  // `rank`: equal keys before the unit
    bool equal[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      equal[j] = unit + j < p.K && key[j] == threshold;
      const uint32_t ballot = __ballot_sync(kAllLanes, equal[j]);
      rank += __popc(ballot & lanes_before);
      equal_in_piece += __popc(ballot);
    }
    uint32_t nibble = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const bool above = unit + j < p.K && key[j] > threshold;
      nibble |= static_cast<uint32_t>(above || (equal[j] && rank < wanted)) << j;
      rank += equal[j];
    }
    store_piece(p.gate + m * p.words + 2 * piece, join_nibbles(nibble));
    equal_before += equal_in_piece;
  }
}

inline cudaError_t sample_engram(const SampleEngram& p, cudaStream_t stream) {
  if (p.M == 0) return cudaSuccess;
  if (p.bernoulli) {
    ENGRAM_LAUNCH(bernoulli_kernel, blocks_for(p.M * p.words / 2), kBlock, stream, p);
  } else {
    const bool aligned = p.K % 4 == 0 && reinterpret_cast<uintptr_t>(p.score) % 16 == 0;
    const auto kernel = aligned ? gumbel_top_k_kernel<true> : gumbel_top_k_kernel<false>;
    ENGRAM_LAUNCH(kernel, static_cast<unsigned>(p.M), kBlock, stream, p);
  }
  return cudaGetLastError();
}

}  // namespace engram::cuda
