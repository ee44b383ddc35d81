// The operators of convolutions: launch.cpp says by which rules their work is shared out.
#include <cstring>
#include <vector>

#include "core/bits.h"
#include "core/window.h"
#include "cpu/launch.h"
#include "cpu/share.h"

namespace engram::cpu {

namespace {

// Blocks among the threads, each of which has scratch of its own: f(block, scratch).
template <typename F>
void share_blocks(const Runtime& rt, int64_t blocks, int64_t work, int64_t scratch_bytes, const F& f) {
  const int64_t shares = rt.threads < blocks ? rt.threads : blocks;
  if (shares == 0) return;
  const int64_t bytes = ceil_div(scratch_bytes, 64) * 64 + 64;  // shares write to no common line of the cache
  char* scratch = workspace<char>(rt, shares * bytes);
  share(rt, shares, work * blocks / shares, [&](Range part) {
    for (int64_t i = part.begin; i < part.end; ++i)
      for (int64_t block = blocks * i / shares; block < blocks * (i + 1) / shares; ++block)
        f(block, scratch + i * bytes);
  });
}

// A runtime that gives the memory of one round again in the next, which asks for the same sizes or smaller ones.
class Rounds {
 public:
  explicit Rounds(const Runtime& rt) : rt_(rt) {}
  Runtime next() {
    used_ = 0;
    Runtime own = rt_;
    own.owner = this;
    own.allocate = [](void* owner, size_t bytes) -> void* {
      auto& self = *static_cast<Rounds*>(owner);
      if (self.used_ == self.memory_.size()) self.memory_.push_back({nullptr, 0});
      Memory& memory = self.memory_[self.used_++];
      if (memory.bytes < bytes) memory = {self.rt_.allocate(self.rt_.owner, bytes), bytes};
      return memory.data;
    };
    return own;
  }

 private:
  struct Memory {
    void* data;
    size_t bytes;
  };
  const Runtime& rt_;
  std::vector<Memory> memory_;
  size_t used_ = 0;
};

bool has_padding(const Window& w) { return (w.top | w.bottom | w.left | w.right) != 0; }

int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr int64_t kWordBytes = sizeof(uint64_t), kFloatBytes = sizeof(float), kCountBytes = sizeof(int32_t);

}  // namespace

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
  const int64_t gate_rows = p.gate == nullptr ? 0 : rows, parts = kernels.gate_parts > 1 ? kernels.gate_parts : 0;
  const int64_t scratch = (rows + gate_rows * (1 + parts)) * kWordBytes + pixels * (N + 1) * kCountBytes;
  share_blocks(rt, ceil_div(M, pixels), pixels * N * words, scratch, [&](int64_t block, char* memory) {
    const Range range = items_of({block, block + 1}, pixels, M);
    const int64_t count = range.end - range.begin;
    auto* x = reinterpret_cast<uint64_t*>(memory);
    uint64_t *gate = x + rows, *gate_parts = gate + gate_rows;
    auto* sums = reinterpret_cast<int32_t*>(gate_parts + gate_rows * parts);
    int32_t* recruited = sums + pixels * N;
    for (int64_t group = 0; group < groups; ++group) {
      kernels.unfold_bits({p.x, p.samples, words_for(units(window)), window, group, x, words}, range);
      PreparedMatmul product{
          {x, w + group * N * words, nullptr, words, count, N, K, words, sums, nullptr, nullptr, nullptr},
          nullptr,
          nullptr};
      if (p.gate != nullptr) {
        kernels.unfold_bits({p.gate, p.samples, p.gate_stride, window, group, gate, words}, range);
        kernels.popcount_rows({gate, words, recruited}, {0, count});
        if (parts > 0) kernels.split_gates({gate, gate_parts}, {0, count * words});
        product.gate = gate, product.recruited = recruited, product.gate_parts = parts > 0 ? gate_parts : gate;
      }
      kernels.binary_matmul(product, {{0, count}, {0, N}});
      const int32_t* missing = tap_sums == nullptr ? nullptr : tap_sums + group * taps(window) * N;
      kernels.finish_pixels({window, sums, N, missing, p.scale, p.y + group * N, p.outputs}, range);
    }
  });
}

void masked_conv2d_input_grad(const Runtime& rt, const MaskedConv2dInputGrad& p) {
  constexpr int64_t kTerms = 3 << 15;  // floats, which stay in the second-level cache
  constexpr int64_t kTile = 16;        // of sign_product
  const Kernels& kernels = *active().load();
  const Window& window = p.window;
  const int64_t groups = window.groups, N = p.outputs / groups, K = group_units(window);
  const int64_t channels = group_channels(window), pixels = out_pixels(window), own_units = units(window);
  const int64_t words = words_for(N);
  // Where there are few samples, threads share the channels of each.
  const int64_t parts = p.samples * groups >= 2 * rt.threads ? 1 : 2 * rt.threads;
  const int64_t part = lesser(ceil_div(ceil_div(channels, parts), kTile) * kTile, channels);
  const int64_t blocks = ceil_div(channels, part);
  const bool whole = groups * blocks == 1;                      // the channels of a sample by one thread
  uint64_t* w_t = workspace<uint64_t>(rt, groups * K * words);  // by group, block, tap and channel
  for (int64_t group = 0; group < groups; ++group) {
    const uint64_t* by_tap = transposed(rt, p.w + group * N * words_for(K), N, K);
    for (int64_t i = 0; i < K; ++i) {
      const int64_t tap = i / channels, c = i % channels, first = c / part * part;
      const int64_t row = group * K + first * taps(window) + tap * lesser(part, channels - first) + c - first;
      memcpy(w_t + row * words, by_tap + i * words, static_cast<size_t>(words * kWordBytes));
    }
  }
  const auto zero = [&](Range samples) {
    const int64_t count = samples.end - samples.begin;
    memset(p.dx + samples.begin * own_units, 0, static_cast<size_t>(count * own_units * kFloatBytes));
  };
  const ZeroUnrecruited unmasked{p.dx, own_units, p.mask, p.mask_stride};
  if (!whole) share(rt, p.samples, own_units, zero);
  const int64_t fit = kTerms / (taps(window) * part) / kTile * kTile;
  const int64_t tile = lesser(fit < kTile ? kTile : fit, pixels), scratch = tile * taps(window) * part * kFloatBytes;
  const int64_t work = pixels * N * part * taps(window) / 16;
  share_blocks(rt, p.samples * groups * blocks, work, scratch, [&](int64_t i, char* memory) {
    const int64_t sample = i / (groups * blocks), group = i / blocks % groups, first = i % blocks * part;
    const int64_t own = lesser(part, channels - first), rows = taps(window) * own;
    auto* z = reinterpret_cast<float*>(memory);
    if (whole) zero({sample, sample + 1});
    for (int64_t m = 0; m < pixels; m += tile) {
      const int64_t some = lesser(tile, pixels - m);
      const float* d = p.d + (sample * pixels + m) * p.outputs + group * N;
      const uint64_t* signs = w_t + (group * K + first * taps(window)) * words;
      kernels.sign_product({d, Element::kFloat32, p.outputs, 1, signs, nullptr, words, z, rows, some, N, rows},
                           {{0, some}, {0, rows}});
      float* dx = p.dx + sample * own_units + group * channels + first;
      kernels.fold_taps({window, z, own, p.scale, dx}, {m, m + some});
    }
    if (whole) kernels.zero_unrecruited(unmasked, {sample, sample + 1});
  });
  if (!whole) share(rt, p.samples, own_units, [&](Range samples) { kernels.zero_unrecruited(unmasked, samples); });
}

void gated_conv2d_weight_grad(const Runtime& rt, const GatedConv2dWeightGrad& p) {
  constexpr int64_t kUnfoldedWords = 1 << 17;  // 1 MiB of taps at a time
  const Kernels& kernels = *active().load();
  const Window& window = p.window;
  const int64_t groups = window.groups, N = p.outputs / groups, K = group_units(window);
  const int64_t channels = group_channels(window), M = p.samples * out_pixels(window), words = words_for(K);
  const int64_t fit = kUnfoldedWords / words / kSampleChunk * kSampleChunk,
                rows = fit < kSampleChunk ? kSampleChunk : fit;
  const auto unfold = [&](const Runtime& own, const uint64_t* bits, int64_t stride, int64_t group, Range range) {
    uint64_t* out = workspace<uint64_t>(own, (range.end - range.begin) * words);
    share(rt, range.end - range.begin, taps(window) * 4 + words, [&](Range part) {
      kernels.unfold_bits({bits, p.samples, stride, window, group, out + part.begin * words, words},
                          {range.begin + part.begin, range.begin + part.end});
    });
    return out;
  };
  Rounds rounds(rt);
  float* sums = M > rows ? workspace<float>(rt, N * K) : nullptr;
  float* padded = p.gate == nullptr && has_padding(window) ? workspace<float>(rt, taps(window) * N) : nullptr;
  for (int64_t group = 0; group < groups; ++group) {
    float* dw = p.dw + group * N * K;
    int64_t m = 0;
    do {  // at least once: an empty batch has a gradient of zeros
      const Runtime own = rounds.next();
      const int64_t some = lesser(rows, M - m);
      const uint64_t* x = unfold(own, p.x, words_for(units(window)), group, {m, m + some});
      const uint64_t* gate = p.gate == nullptr ? nullptr : unfold(own, p.gate, p.gate_stride, group, {m, m + some});
      const float* d = p.d + m * p.outputs;
      if (groups > 1) {
        float* packed = workspace<float>(own, some * N);
        share(rt, some, N, [&](Range part) {
          for (int64_t i = part.begin; i < part.end; ++i)
            memcpy(packed + i * N, d + i * p.outputs + group * N, static_cast<size_t>(N * kFloatBytes));
        });
        d = packed;
      }
      float* y = m == 0 ? dw : sums;
      sign_product(own, {d, Element::kFloat32, true, x, true, gate, words, nullptr, 0, y, N, some, K});
      if (m > 0)
        share(rt, N * K, 1, [&](Range part) {
          for (int64_t i = part.begin; i < part.end; ++i) dw[i] += sums[i];
        });
      m += rows;
    } while (m < M);
    if (padded != nullptr) {
      const AddPadding padding{window, p.d + group * N, p.outputs, N, p.samples, padded};
      share(rt, taps(window), M * N / 4, [&](Range part) { kernels.add_padding(padding, part); });
    }
    share(rt, N, K, [&](Range part) {
      for (int64_t n = part.begin; n < part.end; ++n)
        for (int64_t i = 0; i < K; ++i) {
          const float sum = padded == nullptr ? dw[n * K + i] : dw[n * K + i] + padded[i / channels * N + n];
          dw[n * K + i] = sum * p.scale;
        }
    });
  }
}

}  // namespace engram::cpu
