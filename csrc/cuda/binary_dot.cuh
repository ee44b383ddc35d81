// binary_matmul, dot form, for a few samples: y[m,n] = popc(g[m]) - 2 popc((x[m] ^ w[n]) & g[m]), by popcount
//
//   arguments as in cuda/binary_matmul.cuh
//
// Sixteen lanes stream along two or four rows of w, 32 bytes of each at a time, and meet one or four samples. The 8
// words of a step are added by carry-save adders (3 words in, sum and carry out, one LOP3 each) before they are
// counted: 4 POPC and 8 LOP3 instead of 8 POPC, whose rate is a quarter of LOP3's. Sums over lanes are halved at every
// exchange, so that eight of them cost eight shuffles. No tensor cores: the same on every architecture. Bound: reading
// w for one sample, POPC and LOP3 for more.
#pragma once

#include "cuda/binary_matmul.cuh"

namespace engram::cuda {

constexpr int kDotLanes = 16;
constexpr int kMostDotSamples = 8;  // up to which this form is taken

template <int kSamples_, bool kGated_>
struct DotTile {
  static constexpr int kSamples = kSamples_, kColumns = kSamples == 1 ? 4 : 2;
  static constexpr bool kGated = kGated_;
  static constexpr int kValues = kColumns * kSamples;
  static constexpr int kBlockColumns = kBlock / kDotLanes * kColumns, kBlockWords = kBlockColumns / 32;
};

struct EightWords {
  uint4 low, high;
};

__device__ __forceinline__ EightWords load_eight(const uint64_t* row, int64_t word, int64_t words) {
  EightWords eight{make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
  if (word < words) eight.low = *reinterpret_cast<const uint4*>(row + word);
  if (word + 2 < words) eight.high = *reinterpret_cast<const uint4*>(row + word + 2);
  return eight;
}

__device__ __forceinline__ void add_carry_save(uint32_t a, uint32_t b, uint32_t c, uint32_t& sum, uint32_t& carry) {
  sum = a ^ b ^ c;
  carry = (a & b) | (a & c) | (b & c);
}

__device__ __forceinline__ int popcount(const uint32_t (&v)[8]) {
  uint32_t sum0, sum1, ones, carry0, carry1, carry2, twos, fours;
  add_carry_save(v[0], v[1], v[2], sum0, carry0);
  add_carry_save(v[3], v[4], v[5], sum1, carry1);
  add_carry_save(sum0, sum1, v[6], ones, carry2);
  add_carry_save(carry0, carry1, carry2, twos, fours);
  return __popc(ones) + __popc(v[7]) + 2 * __popc(twos) + 4 * __popc(fours);
}

__device__ __forceinline__ void to_array(const EightWords& v, uint32_t (&words)[8]) {
  words[0] = v.low.x, words[1] = v.low.y, words[2] = v.low.z, words[3] = v.low.w;
  words[4] = v.high.x, words[5] = v.high.y, words[6] = v.high.z, words[7] = v.high.w;
}

// Sums `values` over the lanes that share rows of w. Each lane ends with one sum, values[0], of index `first`; several
// have the same if there are fewer values than lanes.
template <int kValues>
__device__ __forceinline__ void sum_over_lanes(int (&values)[kValues], int& first) {
  static_assert(kValues <= kDotLanes, "a lane keeps one sum");
  int left = kValues;
  first = 0;
#pragma unroll
  for (int offset = kDotLanes / 2; offset > 0; offset /= 2) {
    if (left == 1) {
      values[0] += __shfl_xor_sync(kAllLanes, values[0], offset);
      continue;
    }
    left /= 2;
    const bool upper = lane_id() & offset;
#pragma unroll
    for (int i = 0; i < kValues / 2; ++i) {
      if (i >= left) break;
      const int sent = upper ? values[i] : values[i + left], kept = upper ? values[i + left] : values[i];
      values[i] = kept + __shfl_xor_sync(kAllLanes, sent, offset);
    }
    if (upper) first += left;
  }
}

template <typename Tile, Output kOutput>
__global__ void __launch_bounds__(kBlock, 2) binary_dot_kernel(BinaryMatmul p) {
  constexpr int kSamples = Tile::kSamples, kColumns = Tile::kColumns;
  constexpr bool kGated = Tile::kGated;
  const int64_t columns = kOutput == Output::kProduct ? p.N : words_for(p.N) * kWordBits;
  const int64_t column_blocks = ceil_div(columns, Tile::kBlockColumns);
  const int64_t m = blockIdx.x / column_blocks * kSamples;
  const int64_t block_n = blockIdx.x % column_blocks * Tile::kBlockColumns;
  const int lane = lane_id() % kDotLanes, thread = static_cast<int>(threadIdx.x);
  const int64_t n = block_n + thread / kDotLanes * kColumns;

  int values[Tile::kValues] = {};  // y, or without a gate the distance, of column j and sample s at [j][s]
  for (int64_t word = lane * 4; word < p.words; word += kDotLanes * 4) {
    EightWords w[kColumns];
#pragma unroll
    for (int j = 0; j < kColumns; ++j) w[j] = load_eight(p.w + (n + j) * p.words, word, n + j < p.N ? p.words : 0);
#pragma unroll
    for (int s = 0; s < kSamples; ++s) {
      const int64_t words = m + s < p.M ? p.words : 0;
      uint32_t x[8], g[8];
      to_array(load_eight(p.x + (m + s) * p.words, word, words), x);
      int recruited = 0;
      if (kGated) {
        to_array(load_eight(p.gate + (m + s) * p.gate_stride, word, words), g);
        recruited = popcount(g);
      }
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        uint32_t differ[8];
        to_array(w[j], differ);
#pragma unroll
        for (int i = 0; i < 8; ++i) differ[i] = kGated ? (differ[i] ^ x[i]) & g[i] : differ[i] ^ x[i];
        values[j * kSamples + s] += kGated ? recruited - 2 * popcount(differ) : popcount(differ);
      }
    }
  }
  int index;
  sum_over_lanes(values, index);

  const int s = index % kSamples;
  const int64_t row = m + s, column = n + index / kSamples;
  const bool there = lane % (kDotLanes / Tile::kValues) == 0 && row < p.M && column < p.N;
  // Unsigned, since twice a distance may pass 2^31 where the difference does not.
  const int32_t y =
      kGated ? values[0] : static_cast<int32_t>(static_cast<uint32_t>(p.K) - 2u * static_cast<uint32_t>(values[0]));
  if constexpr (kOutput == Output::kProduct) {
    if (there) p.y[row * p.N + column] = y;
  } else {
    __shared__ uint32_t bits[kSamples][Tile::kBlockWords];
    const int own_s = thread / Tile::kBlockWords, own_word = thread % Tile::kBlockWords;
    if (own_s < kSamples) bits[own_s][own_word] = 0;
    __syncthreads();
    if (there && (y >= p.threshold[column]) != (p.flip[column] != 0))
      atomicOr(&bits[s][(column - block_n) / 32], 1u << (column - block_n) % 32);
    __syncthreads();
    if (own_s < kSamples && m + own_s < p.M)
      reinterpret_cast<uint32_t*>(p.y_bits + (m + own_s) * words_for(p.N))[block_n / 32 + own_word] =
          bits[own_s][own_word];
  }
}

template <int kSamples, bool kGated>
cudaError_t launch_dots(const BinaryMatmul& p, cudaStream_t stream) {
  using Tile = DotTile<kSamples, kGated>;
  const bool product = p.y != nullptr;
  const int64_t columns = product ? p.N : words_for(p.N) * kWordBits;
  const auto blocks = static_cast<unsigned>(ceil_div(p.M, kSamples) * ceil_div(columns, Tile::kBlockColumns));
  const auto kernel = product ? binary_dot_kernel<Tile, Output::kProduct> : binary_dot_kernel<Tile, Output::kThreshold>;
  ENGRAM_LAUNCH(kernel, blocks, kBlock, stream, p);
  return cudaGetLastError();
}

inline cudaError_t binary_matmul_dots(const BinaryMatmul& p, cudaStream_t stream) {
  const bool gated = p.gate != nullptr;
  if (p.M == 1) return gated ? launch_dots<1, true>(p, stream) : launch_dots<1, false>(p, stream);
  return gated ? launch_dots<4, true>(p, stream) : launch_dots<4, false>(p, stream);
}

// Both forms give the same integers; the dot form is for so few samples that the tensor cores would multiply padding.
inline cudaError_t binary_matmul(const BinaryMatmul& p, cudaStream_t stream) {
  if (p.M == 0 || p.N == 0) return cudaSuccess;
  return p.M <= kMostDotSamples ? binary_matmul_dots(p, stream) : binary_matmul_tiles(p, stream);
}

}  // namespace engram::cuda
