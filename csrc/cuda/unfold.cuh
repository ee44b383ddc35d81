// unfold_bits: rows[m] = the taps of output pixel m, 0 where they are padding (core/window.h)
//
//   bits  [samples, words_for(units)]      rows  [samples * out_pixels, words]
//
// A thread makes a word of 64 bits of a row: of each tap that lies in it, a run of channels, which it reads as one or
// two words. Neighbouring threads make neighbouring words, and read the same pixels. Bound by memory where a tap has 64
// channels or more, below that by the taps of a word.
#pragma once

#include "core/window.h"
#include "cuda/warp.cuh"

namespace engram::cuda {

// `count` bits, 1 to 64, from bit `at` on.
__device__ __forceinline__ uint64_t run_of_bits(const uint64_t* bits, int64_t at, int64_t count) {
  const int64_t word = at / kWordBits, shift = at % kWordBits;
  uint64_t value = bits[word] >> shift;
  if (shift + count > kWordBits) value |= bits[word + 1] << (kWordBits - shift);
  return value & valid_bits(0, count);
}

__global__ void __launch_bounds__(kBlock) unfold_kernel(UnfoldBits p) {
  const Window& w = p.window;
  const int64_t channels = group_channels(w), used = group_units(w);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kBlock, all = p.samples * out_pixels(w) * p.words;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x; i < all; i += step) {
    const int64_t first = i % p.words * kWordBits;
    const Pixel pixel = pixel_of(w, i / p.words);
    const Taps rows = taps_of_row(w, pixel.y), columns = taps_of_column(w, pixel.x);
    const uint64_t* sample = p.bits + pixel.sample * p.stride;
    uint64_t word = 0;
    for (int64_t at = first; at < first + kWordBits && at < used;) {
      const int64_t tap = at / channels, c = at % channels, row = tap / w.kernel_w, column = tap % w.kernel_w;
      int64_t count = channels - c;
      if (count > first + kWordBits - at) count = first + kWordBits - at;
      if (row >= rows.first && row < rows.last && column >= columns.first && column < columns.last) {
        const int64_t y = rows.start + row * w.dilation_h, x = columns.start + column * w.dilation_w;
        const int64_t bit = (y * w.width + x) * w.channels + p.group * channels + c;
        word |= run_of_bits(sample, bit, count) << (at - first);
      }
      at += count;
    }
    p.rows[i] = word;
  }
}

inline cudaError_t unfold_bits(const UnfoldBits& p, cudaStream_t stream) {
  const int64_t words = p.samples * out_pixels(p.window) * p.words;
  if (words == 0) return cudaSuccess;
  ENGRAM_LAUNCH(unfold_kernel, blocks_for(ceil_div(words, kWarp)), kBlock, stream, p);
  return cudaGetLastError();
}

}  // namespace engram::cuda
