// The operators of convolutions: launch.cpp says by which rules their work is shared out.
#include "core/bits.h"
#include "core/window.h"
#include "cpu/launch.h"
#include "cpu/share.h"

namespace engram::cpu {

void unfold_bits(const Runtime& rt, const UnfoldBits& p) {
  const Kernels& kernels = *active().load();
  share(rt, p.samples * out_pixels(p.window), taps(p.window) * 4 + p.words, [&](Range pixels) {
    UnfoldBits own = p;
    own.rows += pixels.begin * p.words;
    kernels.unfold_bits(own, pixels);
  });
}

void interleave_bits(const Runtime& rt, const InterleaveBits& p) {
  const Kernels& kernels = *active().load();
  share(rt, p.samples, p.rows * p.K / 8, [&](Range samples) { kernels.interleave_bits(p, samples); });
}

void binary_conv2d(const Runtime& rt, const BinaryConv2d& p) {
  constexpr int64_t kPixels = 240;  // whose taps and sums stay in the second-level cache
  const Kernels& kernels = *active().load();
  const Window& window = p.window;
  const int64_t M = p.samples * out_pixels(window), groups = window.groups, N = p.outputs / groups;
  const int64_t K = group_units(window), words = ceil_div(K, kWordBits);  // no padding to 128 bits, which would count
  uint64_t* w = workspace<uint64_t>(rt, p.outputs * words);
  for (int64_t n = 0; n < p.outputs; ++n)
    for (int64_t i = 0; i < words; ++i) w[n * words + i] = p.w[n * words_for(K) + i];
  int32_t* tap_sums = nullptr;
  if (p.gate == nullptr && has_padding(window)) {
    tap_sums = workspace<int32_t>(rt, groups * taps(window) * N);
    for (int64_t group = 0; group < groups; ++group)
      kernels.tap_sums({w + group * N * words, N, words, group_channels(window), tap_sums + group * taps(window) * N},
                       {0, taps(window)});
  }
  const int64_t even = ceil_div(M, 4 * rt.threads), pixels = even < 16 ? 16 : lesser(even, kPixels);
  const int64_t rows = pixels * words;  // in words, as the other sizes of the scratch
  const int64_t gate_rows = p.gate == nullptr ? 0 : rows, tile_words = 1 + kernels.gate_parts;
  const bool in_place = p.sums != nullptr && groups == 1;  // sums lie as they come
  const int64_t own_sums = in_place ? 0 : pixels * N;
  const int64_t scratch = (rows + gate_rows * (1 + tile_words)) * kWordBytes + (own_sums + pixels) * kCountBytes;
  share_blocks(rt, ceil_div(M, pixels), pixels * N * words, scratch, [&](int64_t block, char* memory) {
    const Range range = items_of({block, block + 1}, pixels, M);
    const int64_t count = range.end - range.begin;
    auto* x = reinterpret_cast<uint64_t*>(memory);
    uint64_t *gate = x + rows, *tiles = gate + gate_rows;
    auto* recruited = reinterpret_cast<int32_t*>(tiles + gate_rows * tile_words);
    int32_t* sums = in_place ? p.sums + range.begin * N : recruited + pixels;
    for (int64_t group = 0; group < groups; ++group) {
      kernels.unfold_bits({p.x, p.samples, words_for(units(window)), window, group, x, words}, range);
      PreparedMatmul product{
          {x, w + group * N * words, nullptr, words, count, N, K, words, sums, nullptr, nullptr, nullptr},
          nullptr,
          nullptr};
      if (p.gate != nullptr) {
        kernels.unfold_bits({p.gate, p.samples, p.gate_stride, window, group, gate, words}, range);
        kernels.popcount_rows({gate, words, recruited}, {0, count});
        kernels.tile_samples({x, gate, words, count, words, tiles}, {0, ceil_div(count, kernels.gated_tile)});
        product.gate = gate, product.recruited = recruited, product.tiles = tiles;
      }
      kernels.binary_matmul(product, {{0, count}, {0, N}});
      const int32_t* missing = tap_sums == nullptr ? nullptr : tap_sums + group * taps(window) * N;
      float* y = p.y == nullptr ? nullptr : p.y + group * N;
      int32_t* whole = p.sums == nullptr ? nullptr : p.sums + group * N;
      kernels.finish_pixels({window, sums, N, missing, p.scale, y, whole, p.outputs}, range);
    }
  });
}

void pool_bits(const Runtime& rt, const PoolBits& p, int64_t samples) {
  const Kernels& kernels = *active().load();
  const int64_t steps = out_pixels(p.window) * taps(p.window) * ceil_div(p.window.channels, kWordBits) * 4;
  share(rt, samples, steps, [&](Range part) { kernels.pool_bits(p, part); });
}

}  // namespace engram::cpu
