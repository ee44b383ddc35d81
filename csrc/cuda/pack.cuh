// pack_signs:  bit = 1{x >= 0}                pack_window:  bit = 1{|x| <= width} & gate
//
//   x     [rows, K] float32, bfloat16 or float16 (pack_window: float32)
//   bits  [rows, words] (core/bits.h)
//
// A warp makes one 16-byte piece, 128 units. Lane l reads units 4l .. 4l + 3 at once (16 bytes of float32) where rows
// are aligned to that, and their bits are joined by three shuffles; else it reads units l, l + 32, l + 64, l + 96, and
// a ballot is a word. Bound by memory: 4 or 2 bytes read a unit.
#pragma once

#include <cstring>

#include "cuda/warp.cuh"

namespace engram::cuda {

// Tests of one unit, on the bits of its number.
struct SignOfFloat32 {
  using Number = uint32_t;
  __device__ bool operator()(uint32_t x, bool& nan) const {
    nan |= (x & 0x7FFFFFFFu) > 0x7F800000u;
    return x <= 0x80000000u;  // positive, or -0
  }
};
struct SignOf16Bits {
  using Number = uint16_t;
  uint16_t infinity;
  __device__ bool operator()(uint16_t x, bool& nan) const {
    nan |= (x & 0x7FFFu) > infinity;
    return x <= 0x8000u;
  }
};
struct WithinWindow {
  using Number = uint32_t;
  uint32_t width;  // bits of a positive float: floats without their sign are ordered like their bits
  __device__ bool operator()(uint32_t x, bool&) const { return (x & 0x7FFFFFFFu) <= width; }
};

template <typename Number>
struct alignas(4 * sizeof(Number)) FourNumbers {
  Number of[4];
};

// The bits of a warp's 128 units from `unit`, as join_nibbles leaves them. Units from K on give 0.
template <bool kAligned, typename Test>
__device__ __forceinline__ uint32_t bits_of_piece(const typename Test::Number* row, int64_t unit, int64_t K,
                                                  const Test& test, bool& nan) {
  using Number = typename Test::Number;
  const int lane = lane_id();
  if constexpr (kAligned) {  // K is a multiple of 4
    uint32_t nibble = 0;
    if (unit + 4 * lane < K) {
      const auto four = *reinterpret_cast<const FourNumbers<Number>*>(row + unit + 4 * lane);
#pragma unroll
      for (int i = 0; i < 4; ++i) nibble |= static_cast<uint32_t>(test(four.of[i], nan)) << i;
    }
    return join_nibbles(nibble);
  } else {
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t own = unit + kWarp * i + lane;
      const uint32_t ballot = __ballot_sync(kAllLanes, own < K && test(row[own], nan));
      if (lane / 8 == i) word = ballot;
    }
    return word;
  }
}

template <bool kAligned, typename Test>
__global__ void __launch_bounds__(kBlock)
    pack_kernel(const typename Test::Number* __restrict__ x, const uint64_t* __restrict__ gate, int64_t gate_stride,
                int64_t rows, int64_t K, int64_t words, uint64_t* __restrict__ bits, Test test, int32_t* nan_flag) {
  const int64_t pieces = words / 2;
  bool nan = false;
  for (int64_t i = first_piece(); i < rows * pieces; i += piece_step()) {
    const int64_t row = i / pieces, word = i % pieces * 2;
    uint32_t joined = bits_of_piece<kAligned>(x + row * K, word * kWordBits, K, test, nan);
    if (gate != nullptr) joined &= words32(gate + row * gate_stride + word)[lane_id() / 8];
    store_piece(bits + row * words + word, joined);
  }
  if (nan) *nan_flag = 1;
}

template <typename Test>
cudaError_t launch_pack(const void* x, const uint64_t* gate, int64_t gate_stride, int64_t rows, int64_t K,
                        int64_t words, uint64_t* bits, Test test, int32_t* nan, cudaStream_t stream) {
  using Number = typename Test::Number;
  if (rows == 0) return cudaSuccess;
  const bool aligned = K % 4 == 0 && reinterpret_cast<uintptr_t>(x) % (4 * sizeof(Number)) == 0;
  const auto kernel = aligned ? pack_kernel<true, Test> : pack_kernel<false, Test>;
  ENGRAM_LAUNCH(kernel, blocks_for(rows * words / 2), kBlock, stream, static_cast<const Number*>(x), gate, gate_stride,
                rows, K, words, bits, test, nan);
  return cudaGetLastError();
}

inline cudaError_t pack_signs(const PackSigns& p, cudaStream_t stream) {
  if (p.element == Element::kFloat32)
    return launch_pack(p.x, nullptr, 0, p.rows, p.K, p.words, p.bits, SignOfFloat32{}, p.nan, stream);
  const SignOf16Bits test{static_cast<uint16_t>(p.element == Element::kBFloat16 ? 0x7F80 : 0x7C00)};
  return launch_pack(p.x, nullptr, 0, p.rows, p.K, p.words, p.bits, test, p.nan, stream);
}

inline cudaError_t pack_window(const PackWindow& p, cudaStream_t stream) {
  uint32_t width;
  memcpy(&width, &p.width, sizeof width);
  return launch_pack(p.x, p.gate, p.gate_stride, p.rows, p.K, p.words, p.bits, WithinWindow{width}, nullptr, stream);
}

}  // namespace engram::cuda
