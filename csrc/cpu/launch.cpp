// Shares the work of each operator out among threads. No result depends on how: every output element is computed whole
// by one thread, in an order that the split does not change and in one floating-point mode.
#include "cpu/launch.h"

#include <atomic>
#include <cstring>

#include "core/bits.h"
#include "cpu/float_mode.h"

namespace engram::cpu {

namespace scalar {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#elif defined(__aarch64__)
namespace neon {
extern const Kernels kernels;
}
#endif

namespace {

// Elementary steps below which a second thread costs more than it brings (about 10 microseconds of work).
constexpr int64_t kGrainWork = 1 << 15;

std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> usable;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vpopcntdq"))
    usable.push_back(&avx512::kernels);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) usable.push_back(&avx2::kernels);
#elif defined(__aarch64__)
  usable.push_back(&neon::kernels);
#endif
  usable.push_back(&scalar::kernels);
  return usable;
}

std::atomic<const Kernels*>& active() {
  static std::atomic<const Kernels*> kernels{usable_kernels().front()};
  return kernels;
}

template <typename F>
void share(const Runtime& rt, int64_t count, int64_t work_per_item, const F& f) {
  if (count <= 0) return;
  const int64_t grain = work_per_item >= kGrainWork ? 1 : ceil_div(kGrainWork, work_per_item < 1 ? 1 : work_per_item);
  rt.parallel_for(
      count, grain,
      [](int64_t begin, int64_t end, void* context) {
        const DefaultFloatMode mode;
        (*static_cast<const F*>(context))(begin, end);
      },
      const_cast<F*>(&f));
}

template <typename T>
T* workspace(const Runtime& rt, int64_t elements) {
  return static_cast<T*>(rt.allocate(rt.owner, static_cast<size_t>(elements) * sizeof(T)));
}

// The rows with their padding set to 0: themselves where it is, as in everything that this library packs.
const uint64_t* without_padding(const Runtime& rt, const uint64_t* bits, int64_t rows, int64_t k) {
  const int64_t words = words_for(k), first = k / kWordBits;  // the words from `first` on hold padding
  uint64_t set = 0;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t word = first; word < words; ++word) set |= bits[row * words + word] & ~valid_bits(word, k);
  if (set == 0) return bits;
  uint64_t* cleared = workspace<uint64_t>(rt, rows * words);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t word = 0; word < words; ++word)
      cleared[row * words + word] = bits[row * words + word] & valid_bits(word, k);
  return cleared;
}

// Whether to split a product over its `outer` blocks (the better for reuse of the operand they stand for) or over
// samples.
bool enough_blocks(const Runtime& rt, int64_t blocks) { return blocks >= 4 * rt.threads; }

}  // namespace

const char* isa() { return active().load()->isa; }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : usable_kernels()) names.emplace_back(kernels->isa);
  return names;
}

bool set_isa(const std::string& name) {
  for (const Kernels* kernels : usable_kernels()) {
    if (name == kernels->isa) {
      active().store(kernels);
      return true;
    }
  }
  return false;
}

bool pack_signs(const Runtime& rt, const void* x, Element element, int64_t rows, int64_t k, uint64_t* bits) {
  const Kernels& kernels = *active().load();
  std::atomic<bool> nan{false};
  share(rt, rows, k, [&](int64_t begin, int64_t end) {
    if (kernels.pack_signs(x, element, k, bits, begin, end)) nan.store(true);
  });
  return nan.load();
}

void pack_window(const Runtime& rt, const float* x, float width, int64_t rows, int64_t k, const uint64_t* gate,
                 int64_t gate_stride, uint64_t* bits) {
  const Kernels& kernels = *active().load();
  share(rt, rows, k,
        [&](int64_t begin, int64_t end) { kernels.pack_window(x, width, k, gate, gate_stride, bits, begin, end); });
}

void unpack_signs(const Runtime& rt, const uint64_t* bits, int64_t rows, int64_t k, int size, uint64_t plus,
                  uint64_t minus, void* out) {
  const Kernels& kernels = *active().load();
  share(rt, rows, k,
        [&](int64_t begin, int64_t end) { kernels.unpack_signs(bits, k, size, plus, minus, out, begin, end); });
}

void binary_matmul(const Runtime& rt, BinaryMatmul p) {
  const Kernels& kernels = *active().load();
  if (p.gate == nullptr) {
    p.x = without_padding(rt, p.x, p.M, p.K);
  } else {
    const int64_t rows = p.gate_stride == 0 ? 1 : p.M;
    p.gate = without_padding(rt, p.gate, rows, p.K);
    int32_t* recruited = workspace<int32_t>(rt, rows);
    share(rt, rows, p.words,
          [&](int64_t begin, int64_t end) { kernels.popcount_rows(p.gate, p.words, recruited, begin, end); });
    p.recruited = recruited;
    p.gate_parts = p.gate;
    if (kernels.gate_parts > 1) {
      uint64_t* parts = workspace<uint64_t>(rt, rows * p.words * kernels.gate_parts);
      share(rt, rows * p.words, 1, [&](int64_t begin, int64_t end) { kernels.split_gates(p.gate, parts, begin, end); });
      p.gate_parts = parts;
    }
  }
  const int64_t panels = ceil_div(p.N, kernels.panel);
  if (enough_blocks(rt, panels) || panels >= p.M) {
    share(rt, panels, p.M * p.words * kernels.panel, [&](int64_t begin, int64_t end) {
      const int64_t n_end = end * kernels.panel;
      kernels.binary_matmul(p, 0, p.M, begin * kernels.panel, n_end < p.N ? n_end : p.N);
    });
  } else {
    share(rt, p.M, p.N * p.words, [&](int64_t begin, int64_t end) { kernels.binary_matmul(p, begin, end, 0, p.N); });
  }
}

void binary_threshold(const Runtime& rt, const BinaryMatmul& p, const int32_t* threshold, const uint8_t* flip,
                      uint64_t* bits) {
  constexpr int64_t kSamples = 256;  // whose products are held at a time
  const Kernels& kernels = *active().load();
  BinaryMatmul part = p;
  part.y = workspace<int32_t>(rt, (p.M < kSamples ? p.M : kSamples) * p.N);
  for (int64_t m = 0; m < p.M; m += kSamples) {
    part.M = p.M - m < kSamples ? p.M - m : kSamples;
    part.x = p.x + m * p.words;
    part.gate = p.gate == nullptr ? nullptr : p.gate + m * p.gate_stride;
    binary_matmul(rt, part);
    share(rt, part.M, p.N, [&](int64_t begin, int64_t end) {
      kernels.pack_reached(part.y, threshold, flip, p.N, bits + m * words_for(p.N), begin, end);
    });
  }
}

// Densities of a gate above which the dense kernel is the faster one, as 1 / density.
constexpr int64_t kDenseInputGrad = 3, kDenseWeightGrad = 2;

// A product with signs, shared out over v where that leaves enough tiles for all threads, else over rows.
static void sign_product(const Runtime& rt, const Kernels& kernels, const SignProduct& p) {
  constexpr int64_t kColumns = 32, kRows = 64;  // multiples of the kernel's tile
  const int64_t column_blocks = ceil_div(p.V, kColumns), row_blocks = ceil_div(p.R, kRows);
  if (enough_blocks(rt, column_blocks) || column_blocks >= row_blocks) {
    share(rt, column_blocks, p.R * p.I, [&](int64_t begin, int64_t end) {
      const int64_t v_end = end * kColumns;
      kernels.sign_product(p, begin * kColumns, v_end < p.V ? v_end : p.V, 0, p.R);
    });
  } else {
    share(rt, row_blocks, p.V * p.I, [&](int64_t begin, int64_t end) {
      const int64_t r_end = end * kRows;
      kernels.sign_product(p, 0, p.V, begin * kRows, r_end < p.R ? r_end : p.R);
    });
  }
}

void transpose_bits(const Runtime& rt, const uint64_t* bits, int64_t rows, int64_t k, uint64_t* out) {
  const Kernels& kernels = *active().load();
  share(rt, ceil_div(k, kWordBits), rows * 8,
        [&](int64_t begin, int64_t end) { kernels.transpose_bits(bits, rows, k, out, begin, end); });
}

static const uint64_t* transposed(const Runtime& rt, const Kernels& kernels, const uint64_t* bits, int64_t rows,
                                  int64_t k) {
  uint64_t* out = workspace<uint64_t>(rt, k * words_for(rows));
  transpose_bits(rt, bits, rows, k, out);
  return out;
}

void sign_matmul(const Runtime& rt, const float* a, const uint64_t* w, float* y, int64_t M, int64_t N, int64_t K) {
  const Kernels& kernels = *active().load();
  sign_product(rt, kernels, {a, 1, N, transposed(rt, kernels, w, N, K), nullptr, words_for(N), y, K, N, M, K, false});
}

void sign_matmul_t(const Runtime& rt, const void* x, bool exact, const uint64_t* w, void* y, int64_t M, int64_t N,
                   int64_t K) {
  sign_product(rt, *active().load(), {x, 1, K, w, nullptr, words_for(K), y, N, K, M, N, exact});
}

void masked_input_grad(const Runtime& rt, const float* d, const uint64_t* w, const uint64_t* mask, int64_t mask_stride,
                       float* dx, int64_t M, int64_t N, int64_t K) {
  const Kernels& kernels = *active().load();
  const int64_t words = words_for(K), mask_rows = mask_stride == 0 ? 1 : M;
  mask = without_padding(rt, mask, mask_rows, K);
  int32_t* recruited = workspace<int32_t>(rt, mask_rows);
  kernels.popcount_rows(mask, words, recruited, 0, mask_rows);
  int64_t taking_part = 0;
  for (int64_t row = 0; row < mask_rows; ++row) taking_part += recruited[row];
  const uint64_t* w_t = transposed(rt, kernels, w, N, K);
  if (kDenseInputGrad * taking_part > mask_rows * K) {
    sign_product(rt, kernels, {d, 1, N, w_t, nullptr, words_for(N), dx, K, N, M, K, false});
    share(rt, M, K,
          [&](int64_t begin, int64_t end) { kernels.zero_unrecruited(dx, K, mask, mask_stride, begin, end); });
    return;
  }
  const GatedInputGrad p{d, w_t, mask, mask_stride, dx, M, N, K};
  share(rt, M, K + taking_part / (mask_rows < 1 ? 1 : mask_rows) * ceil_div(N, 16),
        [&](int64_t begin, int64_t end) { kernels.gated_input_grad(p, begin, end); });
}

namespace {

// The gradient of a hidden weight, made block by block by whichever kernel is the faster at this density of the gate.
class WeightGrad {
 public:
  static constexpr int64_t kOutputs = 64;  // rows of a block: a multiple of the tiles of both kernels

  WeightGrad(const Runtime& rt, const Kernels& kernels, const WeightGradOperands& operands)
      : kernels_(kernels), p_(operands) {
    const int64_t words = words_for(p_.K);
    int64_t recruited = p_.K, rows = 1;
    if (p_.gate != nullptr) {
      rows = p_.gate_stride == 0 ? 1 : p_.M;
      p_.gate = without_padding(rt, p_.gate, rows, p_.K);
      int32_t* counts = workspace<int32_t>(rt, rows);
      kernels.popcount_rows(p_.gate, words, counts, 0, rows);
      recruited = 0;
      for (int64_t row = 0; row < rows; ++row) recruited += counts[row];
    }
    if (p_.gate != nullptr && kDenseWeightGrad * recruited <= rows * p_.K) {
      const int64_t capacity = p_.M < kSampleChunk ? p_.M : kSampleChunk, chunks = ceil_div(p_.M, kSampleChunk);
      lists_ = {p_.d,
                p_.x,
                p_.gate,
                p_.gate_stride,
                capacity,
                workspace<uint8_t>(rt, chunks * p_.K * capacity),
                workspace<int32_t>(rt, chunks * p_.K),
                p_.M,
                p_.N,
                p_.K,
                words};
      share(rt, ceil_div(p_.K, kWordBits), p_.M * 16,
            [&](int64_t begin, int64_t end) { kernels.list_samples(lists_, begin, end); });
      return;
    }
    if (p_.gate == nullptr) {
      plus_ = transposed(rt, kernels, p_.x, p_.M, p_.K);
      return;
    }
    uint64_t* recruited_signs = workspace<uint64_t>(rt, p_.M * words);
    for (int sign = 0; sign < 2; ++sign) {
      share(rt, p_.M, words, [&](int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end; ++m)
          for (int64_t word = 0; word < words; ++word) {
            const uint64_t x = p_.x[m * words + word], g = p_.gate[m * p_.gate_stride + word];
            recruited_signs[m * words + word] = (sign == 0 ? x : ~x) & g;
          }
      });
      (sign == 0 ? plus_ : minus_) = transposed(rt, kernels, recruited_signs, p_.M, p_.K);
    }
  }

  // As Kernels::gated_weight_grad.
  void block(int64_t n_begin, int64_t n_end, int64_t k_begin, int64_t k_end, float* dw, int64_t dw_stride) const {
    if (lists_.lists != nullptr) {
      kernels_.gated_weight_grad(lists_, n_begin, n_end, k_begin, k_end, dw, dw_stride);
      return;
    }
    const int64_t words = words_for(p_.M), outputs = n_end - n_begin, units = k_end - k_begin;
    const uint64_t* minus = minus_ == nullptr ? nullptr : minus_ + k_begin * words;
    kernels_.sign_product(
        {p_.d + n_begin, p_.N, 1, plus_ + k_begin * words, minus, words, dw, dw_stride, p_.M, outputs, units, false}, 0,
        outputs, 0, units);
  }

 private:
  const Kernels& kernels_;
  WeightGradOperands p_;
  GatedWeightGrad lists_{};
  const uint64_t* plus_ = nullptr;
  const uint64_t* minus_ = nullptr;
};

}  // namespace

void gated_weight_grad(const Runtime& rt, const WeightGradOperands& p, float* dw) {
  constexpr int64_t kUnits = 256;  // at least, so that their tables are worth making
  const WeightGrad gradient(rt, *active().load(), p);
  const int64_t outputs = ceil_div(p.N, WeightGrad::kOutputs);
  const int64_t parts = enough_blocks(rt, outputs) ? 1 : ceil_div(4 * rt.threads, outputs < 1 ? 1 : outputs);
  const int64_t even = ceil_div(ceil_div(p.K, parts), kWordBits) * kWordBits, units = even > kUnits ? even : kUnits;
  const int64_t blocks = ceil_div(p.K, units);
  share(rt, outputs * blocks, p.M * units * 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / blocks * WeightGrad::kOutputs, n_end = n + WeightGrad::kOutputs;
      const int64_t k = i % blocks * units, k_end = k + units;
      gradient.block(n, n_end < p.N ? n_end : p.N, k, k_end < p.K ? k_end : p.K, dw + n * p.K + k, p.K);
    }
  });
}

bool sample_engram(const Runtime& rt, const SampleEngram& p) {
  const Kernels& kernels = *active().load();
  const int64_t shares = rt.threads < p.M ? rt.threads : p.M;
  uint32_t* keys = p.bernoulli ? nullptr : workspace<uint32_t>(rt, shares * p.K);
  std::atomic<bool> nan{false};
  share(rt, shares, shares == 0 ? 1 : p.M * p.K * 16 / shares, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      uint32_t* own_keys = p.bernoulli ? nullptr : keys + i * p.K;
      if (kernels.sample_engram(p, own_keys, p.M * i / shares, p.M * (i + 1) / shares)) nan.store(true);
    }
  });
  return nan.load();
}

bool metaplastic_adam(const Runtime& rt, const MetaplasticAdam& p) {
  const Kernels& kernels = *active().load();
  std::atomic<bool> nan{false};
  share(rt, p.N * ceil_div(p.K, kWordBits), kWordBits * 4, [&](int64_t begin, int64_t end) {
    if (kernels.metaplastic_adam(p, begin, end)) nan.store(true);
  });
  return nan.load();
}

bool gated_metaplastic_adam(const Runtime& rt, const WeightGradOperands& operands, const MetaplasticAdam& p) {
  constexpr int64_t kUnits = 512;           // of a block of the gradient, which stays in the second-level cache
  constexpr int64_t kStride = kUnits + 16;  // rows a power of two apart would share a set of the cache
  constexpr int64_t kOutputs = WeightGrad::kOutputs;
  const Kernels& kernels = *active().load();
  const WeightGrad gradient(rt, kernels, operands);
  const int64_t blocks = ceil_div(p.N, kOutputs), used = ceil_div(p.K, kWordBits);
  const int64_t shares = rt.threads < blocks ? rt.threads : blocks;
  float* scratch = workspace<float>(rt, shares * kOutputs * kStride);
  std::atomic<bool> nan{false};
  const auto update_block = [&](int64_t n_begin, int64_t n_end, float* block) {
    for (int64_t k = 0; k < p.K; k += kUnits) {
      const int64_t k_end = k + kUnits < p.K ? k + kUnits : p.K;
      gradient.block(n_begin, n_end, k, k_end, block, kStride);
      MetaplasticAdam part = p;
      part.grad = block, part.grad_element = Element::kFloat32;
      part.grad_stride = kStride, part.grad_row = n_begin, part.grad_unit = k;
      part.ahead = p.K;  // the next row: pieces of rows are too short for the processor to foresee it
      for (int64_t n = n_begin; n < n_end; ++n)
        if (kernels.metaplastic_adam(part, n * used + k / kWordBits, n * used + ceil_div(k_end, kWordBits)))
          nan.store(true);
    }
  };
  share(rt, shares, shares == 0 ? 1 : p.N * p.K / shares * (operands.M + 8), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t b = blocks * i / shares; b < blocks * (i + 1) / shares; ++b) {
        const int64_t n_end = (b + 1) * kOutputs;
        update_block(b * kOutputs, n_end < p.N ? n_end : p.N, scratch + i * kOutputs * kStride);
      }
    }
  });
  return nan.load();
}

// ---- convolutions

namespace {

// The samples of a row of blocks, each with scratch of its own, among the threads: f(block, scratch of its share).
template <typename F>
void share_blocks(const Runtime& rt, int64_t blocks, int64_t work, int64_t scratch_bytes, const F& f) {
  const int64_t shares = rt.threads < blocks ? rt.threads : blocks;
  if (shares == 0) return;
  const int64_t bytes = ceil_div(scratch_bytes, 64) * 64 + 64;  // shares write to no common line of the cache
  char* scratch = workspace<char>(rt, shares * bytes);
  share(rt, shares, work * blocks / shares, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
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

}  // namespace

void unfold_bits(const Runtime& rt, const Window& window, const uint64_t* bits, int64_t samples, int64_t group,
                 uint64_t* rows) {
  const int64_t stride = words_for(units(window));
  const Kernels& kernels = *active().load();
  const int64_t words = words_for(group_units(window));
  share(rt, samples * out_pixels(window), taps(window) * 4 + words, [&](int64_t begin, int64_t end) {
    kernels.unfold_bits(window, bits, stride, group, rows + begin * words, words, begin, end);
  });
}

void binary_conv2d(const Runtime& rt, const Window& window, const BinaryConvolution& p) {
  constexpr int64_t kPixels = 240;  // whose taps and sums stay in the second-level cache
  const Kernels& kernels = *active().load();
  const int64_t M = p.samples * out_pixels(window), groups = window.groups, N = p.outputs / groups;
  const int64_t K = group_units(window), channels = group_channels(window);
  const int64_t words = ceil_div(K, kWordBits);  // without the padding to 128 bits, which the product would count
  uint64_t* w = workspace<uint64_t>(rt, p.outputs * words);
  for (int64_t n = 0; n < p.outputs; ++n)
    for (int64_t i = 0; i < words; ++i) w[n * words + i] = p.w[n * words_for(K) + i];
  int32_t* tap_sums = nullptr;
  if (p.gate == nullptr && has_padding(window)) {
    tap_sums = workspace<int32_t>(rt, groups * taps(window) * N);
    for (int64_t group = 0; group < groups; ++group)
      kernels.tap_sums(w + group * N * words, N, words, taps(window), channels, tap_sums + group * taps(window) * N);
  }
  const int64_t even = ceil_div(M, 4 * rt.threads), pixels = even < 16 ? 16 : even < kPixels ? even : kPixels;
  const int64_t rows = pixels * words * static_cast<int64_t>(sizeof(uint64_t));
  const bool splits = p.gate != nullptr && kernels.gate_parts > 1;
  const int64_t gate_rows = p.gate == nullptr ? 0 : rows, parts = splits ? kernels.gate_parts * rows : 0;
  const int64_t counts = (N + 1) * pixels * static_cast<int64_t>(sizeof(int32_t));
  share_blocks(
      rt, ceil_div(M, pixels), pixels * N * words, rows + gate_rows + parts + counts,
      [&](int64_t block, char* scratch) {
        const int64_t begin = block * pixels, end = begin + pixels < M ? begin + pixels : M;
        auto* x = reinterpret_cast<uint64_t*>(scratch);
        auto* gate = reinterpret_cast<uint64_t*>(scratch + rows);
        auto* gate_parts = reinterpret_cast<uint64_t*>(scratch + rows + gate_rows);
        auto* sums = reinterpret_cast<int32_t*>(scratch + rows + gate_rows + parts);
        int32_t* recruited = sums + N * pixels;
        for (int64_t group = 0; group < groups; ++group) {
          kernels.unfold_bits(window, p.x, words_for(units(window)), group, x, words, begin, end);
          BinaryMatmul product{x,      w + group * N * words, nullptr, words, nullptr, sums, end - begin, N, K, words,
                               nullptr};
          if (p.gate != nullptr) {
            kernels.unfold_bits(window, p.gate, p.gate_stride, group, gate, words, begin, end);
            kernels.popcount_rows(gate, words, recruited, 0, end - begin);
            if (splits) kernels.split_gates(gate, gate_parts, 0, (end - begin) * words);
            product.gate = gate, product.recruited = recruited, product.gate_parts = splits ? gate_parts : gate;
          }
          kernels.binary_matmul(product, 0, end - begin, 0, N);
          kernels.finish_pixels(window, sums, N, tap_sums == nullptr ? nullptr : tap_sums + group * taps(window) * N,
                                p.scale, p.y + group * N, p.outputs, begin, end);
        }
      });
}

void masked_conv2d_input_grad(const Runtime& rt, const Window& window, const float* d, const uint64_t* w,
                              const uint64_t* mask, int64_t mask_stride, float scale, float* dx, int64_t samples,
                              int64_t outputs) {
  constexpr int64_t kTerms = 3 << 15;  // floats, which stay in the second-level cache
  constexpr int64_t kTile = 16;        // of sign_product
  const Kernels& kernels = *active().load();
  const int64_t groups = window.groups, N = outputs / groups, K = group_units(window),
                channels = group_channels(window);
  const int64_t pixels = out_pixels(window), per_sample = units(window), words = words_for(N);
  // Where there are few samples, threads share the channels of each.
  const int64_t parts = samples * groups >= 2 * rt.threads ? 1 : 2 * rt.threads;
  const int64_t even = ceil_div(ceil_div(channels, parts), kTile) * kTile, part = even < channels ? even : channels;
  const int64_t blocks = ceil_div(channels, part);
  const bool whole = groups * blocks == 1;                      // the channels of a sample by one thread
  uint64_t* w_t = workspace<uint64_t>(rt, groups * K * words);  // by group, block, tap and channel
  for (int64_t group = 0; group < groups; ++group) {
    const uint64_t* by_tap = transposed(rt, kernels, w + group * N * words_for(K), N, K);
    for (int64_t i = 0; i < K; ++i) {
      const int64_t tap = i / channels, c = i % channels, block = c / part;
      const int64_t own = part < channels - block * part ? part : channels - block * part;
      const int64_t row = group * K + block * part * taps(window) + tap * own + c % part;
      memcpy(w_t + row * words, by_tap + i * words, static_cast<size_t>(words) * sizeof(uint64_t));
    }
  }
  const auto zero = [&](int64_t sample) {
    memset(dx + sample * per_sample, 0, static_cast<size_t>(per_sample) * sizeof(float));
  };
  const auto finish = [&](int64_t begin, int64_t end) {
    kernels.zero_unrecruited(dx + begin * per_sample, per_sample, mask + begin * mask_stride, mask_stride, 0,
                             end - begin);
  };
  if (!whole)
    share(rt, samples, per_sample, [&](int64_t begin, int64_t end) {
      for (int64_t sample = begin; sample < end; ++sample) zero(sample);
    });
  const int64_t fit = kTerms / (taps(window) * part) / kTile * kTile, most = fit < kTile ? kTile : fit;
  const int64_t tile = most < pixels ? most : pixels;
  const int64_t scratch = tile * taps(window) * part * static_cast<int64_t>(sizeof(float));
  share_blocks(
      rt, samples * groups * blocks, pixels * N * part * taps(window) / 16, scratch, [&](int64_t i, char* memory) {
        const int64_t sample = i / (groups * blocks), group = i / blocks % groups, first = i % blocks * part;
        const int64_t own = part < channels - first ? part : channels - first, rows = taps(window) * own;
        auto* z = reinterpret_cast<float*>(memory);
        if (whole) zero(sample);
        for (int64_t m = 0; m < pixels; m += tile) {
          const int64_t some = tile < pixels - m ? tile : pixels - m;
          const float* terms = d + (sample * pixels + m) * outputs + group * N;
          const uint64_t* signs = w_t + (group * K + first * taps(window)) * words;
          kernels.sign_product({terms, 1, outputs, signs, nullptr, words, z, rows, N, some, rows, false}, 0, some, 0,
                               rows);
          kernels.fold_taps(window, z, own, scale, dx + sample * per_sample + group * channels + first, m, m + some);
        }
        if (whole) finish(sample, sample + 1);
      });
  if (!whole) share(rt, samples, per_sample, finish);
}

void gated_conv2d_weight_grad(const Runtime& rt, const Window& window, const float* d, const uint64_t* x,
                              const uint64_t* gate, int64_t gate_stride, float scale, float* dw, int64_t samples,
                              int64_t outputs) {
  constexpr int64_t kUnfoldedWords = 1 << 18;  // 2 MiB of taps at a time
  const Kernels& kernels = *active().load();
  const int64_t groups = window.groups, N = outputs / groups, K = group_units(window),
                channels = group_channels(window);
  const int64_t M = samples * out_pixels(window), words = words_for(K), stride = words_for(units(window));
  const int64_t fit = kUnfoldedWords / words / kSampleChunk * kSampleChunk,
                rows = fit < kSampleChunk ? kSampleChunk : fit;
  const auto unfold = [&](const Runtime& own, const uint64_t* bits, int64_t own_stride, int64_t group, int64_t m,
                          int64_t some) {
    uint64_t* out = workspace<uint64_t>(own, some * words);
    share(rt, some, taps(window) * 4 + words, [&](int64_t begin, int64_t end) {
      kernels.unfold_bits(window, bits, own_stride, group, out + begin * words, words, m + begin, m + end);
    });
    return out;
  };
  Rounds rounds(rt);
  float* sums = M > rows ? workspace<float>(rt, N * K) : nullptr;
  float* padded = gate == nullptr && has_padding(window) ? workspace<float>(rt, taps(window) * N) : nullptr;
  for (int64_t group = 0; group < groups; ++group) {
    float* own_dw = dw + group * N * K;
    int64_t m = 0;
    do {  // at least once: an empty batch has a gradient of zeros
      const Runtime own = rounds.next();
      const int64_t some = rows < M - m ? rows : M - m;
      const uint64_t* x_rows = unfold(own, x, stride, group, m, some);
      const uint64_t* gate_rows = gate == nullptr ? nullptr : unfold(own, gate, gate_stride, group, m, some);
      const float* terms = d + m * outputs;
      if (groups > 1) {
        float* packed = workspace<float>(own, some * N);
        share(rt, some, N, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i)
            memcpy(packed + i * N, d + (m + i) * outputs + group * N, static_cast<size_t>(N) * sizeof(float));
        });
        terms = packed;
      }
      gated_weight_grad(own, {terms, x_rows, gate_rows, words, some, N, K}, m == 0 ? own_dw : sums);
      if (m > 0)
        share(rt, N * K, 1, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) own_dw[i] += sums[i];
        });
      m += rows;
    } while (m < M);
    if (padded != nullptr)
      share(rt, taps(window), M * N / 4, [&](int64_t begin, int64_t end) {
        for (int64_t tap = begin; tap < end; ++tap)
          kernels.add_padding(window, d + group * N, outputs, N, samples, tap, padded + tap * N);
      });
    share(rt, N, K, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n)
        for (int64_t i = 0; i < K; ++i) {
          const float sum = padded == nullptr ? own_dw[n * K + i] : own_dw[n * K + i] + padded[i / channels * N + n];
          own_dw[n * K + i] = sum * scale;
        }
    });
  }
}

void interleave_bits(const Runtime& rt, const uint64_t* bits, int64_t samples, int64_t rows, int64_t k, uint64_t* out) {
  const Kernels& kernels = *active().load();
  share(rt, samples, rows * k / 8,
        [&](int64_t begin, int64_t end) { kernels.interleave_bits(bits, rows, k, out, begin, end); });
}

}  // namespace engram::cpu
