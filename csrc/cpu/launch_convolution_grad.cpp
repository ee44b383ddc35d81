// The gradients of convolutions: launch.cpp says by which rules their work is shared out.
#include <atomic>
#include <cstring>
#include <vector>

#include "core/bits.h"
#include "core/window.h"
#include "cpu/launch.h"
#include "cpu/share.h"

namespace engram::cpu {

namespace {

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

OutputGrad output_grad(const float* d, bool outputs_first, const Window& window, int64_t outputs) {
  const int64_t pixels = out_pixels(window);
  return {d, pixels * outputs, outputs_first ? 1 : outputs, outputs_first ? pixels : 1};
}

// Rows a multiple of the page apart would share the sets of the cache.
int64_t spread(int64_t floats) {
  constexpr int64_t kPageFloats = 1024;
  return floats % kPageFloats == 0 ? floats + kGradTile : floats;
}

int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The channels that pixels of each row of bits recruit; `differ`: not all pixels of a row the same ones.
struct Recruited {
  const uint64_t* any;
  bool differ;
};
Recruited channels_of(const Runtime& rt, const Kernels& kernels, const uint64_t* bits, int64_t rows, const Window& w) {
  const int64_t pixels = w.height * w.width;
  uint64_t* any = workspace<uint64_t>(rt, rows * ceil_div(w.channels, kWordBits));
  std::atomic<bool> differ{false};
  share(rt, rows, pixels * ceil_div(w.channels, kWordBits) * 2, [&](Range part) {
    if (kernels.channels_of_pixels({bits, words_for(units(w)), pixels, w.channels, any}, part)) differ.store(true);
  });
  return {any, differ.load()};
}

}  // namespace

void masked_conv2d_input_grad(const Runtime& rt, const MaskedConv2dInputGrad& p) {
  const Kernels& kernels = *active().load();
  const Window& window = p.window;
  const Planes planes = planes_of(window);
  const int64_t groups = window.groups, N = p.outputs / groups, K = group_units(window);
  const int64_t channels = group_channels(window), own_units = units(window), words = words_for(N);
  const int64_t mask_rows = p.mask_stride == 0 ? 1 : p.samples, any_words = ceil_div(window.channels, kWordBits);
  const uint64_t* any = channels_of(rt, kernels, p.mask, mask_rows, window).any;
  // Where there are few samples, threads share the channels of each.
  const int64_t parts = p.samples * groups >= 2 * rt.threads ? 1 : 2 * rt.threads;
  const int64_t part = ceil_div(channels, parts), blocks = ceil_div(channels, part);
  const bool whole = groups * blocks == 1;                      // the channels of a sample by one thread
  uint64_t* w_t = workspace<uint64_t>(rt, groups * K * words);  // [groups, K, words]
  for (int64_t group = 0; group < groups; ++group)
    memcpy(w_t + group * K * words, transposed(rt, p.w + group * N * words_for(K), N, K),
           static_cast<size_t>(K * words * kWordBytes));
  const auto zero = [&](Range samples) {
    const int64_t rows = samples.end - samples.begin;
    memset(p.dx + samples.begin * own_units, 0, static_cast<size_t>(rows * own_units * kFloatBytes));
  };
  const bool passes_over = count(planes) < window.stride_h * window.stride_w;  // pixels that no tap sees
  if (passes_over && !whole) share(rt, p.samples, own_units, zero);
  const ZeroUnrecruited unmasked{p.dx, own_units, p.mask, p.mask_stride};
  const int64_t gradient_stride = spread(round_up(planes.out_numbers, kGradTile));
  const int64_t plane_stride = spread(round_up(planes.area + kGradTile, kGradTile));
  const int64_t gradient_bytes = round_up(N, 4) * gradient_stride * kFloatBytes;
  const int64_t sums_bytes = count(planes) * part * plane_stride * kFloatBytes;
  const int64_t tile_bytes = taps(window) * part * kGradTile * kFloatBytes;
  const int64_t column_bytes = taps(window) * part * static_cast<int64_t>(sizeof(SignColumn));
  const int64_t work = out_pixels(window) * N * part * taps(window) / 16;
  share_blocks(rt, p.samples * groups * blocks, work, gradient_bytes + sums_bytes + tile_bytes + column_bytes,
               [&](int64_t i, char* memory) {
                 const int64_t sample = i / (groups * blocks), group = i / blocks % groups, first = i % blocks * part;
                 if (passes_over && whole) zero({sample, sample + 1});
                 Conv2dInputGrad own{};
                 own.window = window, own.planes = planes;
                 own.d = output_grad(p.d, p.outputs_first, window, p.outputs);
                 own.sample = sample, own.group = group, own.outputs = N;
                 own.w_t = w_t, own.any = any + (mask_rows == 1 ? 0 : sample * any_words);
                 own.scale = p.scale, own.dx = p.dx;
                 own.gradient = reinterpret_cast<float*>(memory);
                 own.sums = reinterpret_cast<float*>(memory + gradient_bytes);
                 own.columns = reinterpret_cast<SignColumn*>(memory + gradient_bytes + sums_bytes + tile_bytes);
                 own.tile = reinterpret_cast<float*>(memory + gradient_bytes + sums_bytes);
                 own.gradient_stride = gradient_stride, own.plane_stride = plane_stride;
                 kernels.conv2d_input_grad(own, {first, lesser(first + part, channels)});
                 if (whole) kernels.zero_unrecruited(unmasked, {sample, sample + 1});
               });
  if (!whole) share(rt, p.samples, own_units, [&](Range samples) { kernels.zero_unrecruited(unmasked, samples); });
}

namespace {

// Where all pixels of a sample recruit the same channels. Threads share blocks of outputs and parts of the samples; how
// many there are depends on the sizes alone.
void weight_grad_by_channels(const Runtime& rt, const Kernels& kernels, const GatedConv2dWeightGrad& p,
                             const uint64_t* recruited) {
  constexpr int64_t kOutputs = 2 * kGradTile, kBlocks = 16, kLeastSamples = 4;
  const Window& window = p.window;
  const Planes planes = planes_of(window);
  const int64_t groups = window.groups, N = p.outputs / groups, K = group_units(window);
  const int64_t blocks = ceil_div(N, kOutputs), wanted = ceil_div(kBlocks, groups * blocks);
  const int64_t most = ceil_div(p.samples, kLeastSamples), parts = most < 1 ? 1 : lesser(wanted, most);
  const int64_t words = ceil_div(planes.rows * out_width(window), kWordBits) + 1;  // the last for shifts past the end
  uint64_t* bits = workspace<uint64_t>(rt, p.samples * planes.down * window.kernel_w * window.channels * words);
  share(rt, p.samples, units(window), [&](Range samples) {
    kernels.tap_planes({p.x, words_for(units(window)), window, planes, bits, words}, samples);
  });
  const int64_t stride = round_up(lesser(N, kOutputs), kGradTile) * K;
  float* sums = workspace<float>(rt, groups * blocks * parts * stride);
  const int64_t pixels = lesser(round_up(out_pixels(window), kWordBits), kGradPixels);
  const int64_t gradient_bytes = kGradPixels * kGradTile * kFloatBytes;
  const int64_t padded_bytes = taps(window) * kGradTile * kFloatBytes;
  const int64_t place_bytes = K * kWordBytes, sign_bytes = pixels / kWordBits * K * kWordBytes;
  const int64_t work = p.samples / parts * out_pixels(window) * K + kGrainWork;
  share_blocks(rt, groups * blocks * parts, work, gradient_bytes + padded_bytes + place_bytes + sign_bytes,
               [&](int64_t i, char* memory) {
                 const int64_t part = i % parts, block = i / parts % blocks, group = i / (parts * blocks);
                 Conv2dWeightGrad own{};
                 own.window = window, own.planes = planes;
                 own.d = output_grad(p.d, p.outputs_first, window, p.outputs);
                 own.group = group, own.first = group * N + block * kOutputs,
                 own.outputs = lesser(kOutputs, N - block * kOutputs);
                 own.planes_bits = bits, own.words = words;
                 own.channels = recruited, own.shared = p.gate_stride == 0, own.pads = has_padding(window);
                 own.gradient = reinterpret_cast<float*>(memory);
                 own.padded = reinterpret_cast<float*>(memory + gradient_bytes);
                 own.places = reinterpret_cast<int64_t*>(memory + gradient_bytes + padded_bytes);
                 own.signs = reinterpret_cast<uint64_t*>(memory + gradient_bytes + padded_bytes + place_bytes);
                 own.sums = sums + i * stride;
                 kernels.conv2d_weight_grad(own, {p.samples * part / parts, p.samples * (part + 1) / parts});
               });
  const AddParts add{sums, blocks, parts, stride, K, N, p.scale, p.dw};
  share(rt, groups * blocks, parts * stride / 8, [&](Range part) { kernels.add_parts(add, part); });
}

// Where they do not: taps are unfolded, for a product by whichever kernel is the faster at the density of the gate.
void weight_grad_by_units(const Runtime& rt, const Kernels& kernels, const GatedConv2dWeightGrad& p) {
  constexpr int64_t kUnfoldedWords = 1 << 17;  // 1 MiB of taps at a time
  const Window& window = p.window;
  const int64_t groups = window.groups, N = p.outputs / groups, K = group_units(window);
  const int64_t M = p.samples * out_pixels(window), words = words_for(K);
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
  for (int64_t group = 0; group < groups; ++group) {
    float* dw = p.dw + group * N * K;
    int64_t m = 0;
    do {
      const Runtime own = rounds.next();
      const int64_t some = lesser(rows, M - m);
      const uint64_t* x = unfold(own, p.x, words_for(units(window)), group, {m, m + some});
      const uint64_t* gate = unfold(own, p.gate, p.gate_stride, group, {m, m + some});
      const float* d = p.d + m * p.outputs;
      if (groups > 1 || p.outputs_first) {
        const OutputGrad from = output_grad(p.d, p.outputs_first, window, p.outputs);
        float* packed = workspace<float>(own, some * N);
        share(rt, some, N, [&](Range part) {
          for (int64_t i = part.begin; i < part.end; ++i) {
            const int64_t sample = (m + i) / out_pixels(window), pixel = (m + i) % out_pixels(window);
            const float* first = from.data + sample * from.sample + pixel * from.pixel + group * N * from.output;
            for (int64_t n = 0; n < N; ++n) packed[i * N + n] = first[n * from.output];
          }
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
    share(rt, N * K, 1, [&](Range part) {
      for (int64_t i = part.begin; i < part.end; ++i) dw[i] *= p.scale;
    });
  }
}

}  // namespace

void gated_conv2d_weight_grad(const Runtime& rt, const GatedConv2dWeightGrad& p) {
  const Kernels& kernels = *active().load();
  if (p.gate == nullptr) return weight_grad_by_channels(rt, kernels, p, nullptr);
  const Recruited recruited = channels_of(rt, kernels, p.gate, p.gate_stride == 0 ? 1 : p.samples, p.window);
  if (recruited.differ) return weight_grad_by_units(rt, kernels, p);
  weight_grad_by_channels(rt, kernels, p, recruited.any);
}

}  // namespace engram::cpu
