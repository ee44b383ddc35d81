// Shares the work of each operator out among threads. No result depends on how: every output element is computed whole
// by one thread, in an order that the split does not change and in one floating-point mode.
#include "cpu/launch.h"

#include <atomic>
#include <cstring>
#include <utility>

#include "core/bits.h"
#include "cpu/share.h"

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

std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> usable;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") &&
      __builtin_cpu_supports("avx512vpopcntdq"))
    usable.push_back(&avx512::kernels);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) usable.push_back(&avx2::kernels);
#elif defined(__aarch64__)
  usable.push_back(&neon::kernels);
#endif
  usable.push_back(&scalar::kernels);
  return usable;
}

}  // namespace

std::atomic<const Kernels*>& active() {
  static std::atomic<const Kernels*> kernels{usable_kernels().front()};
  return kernels;
}

namespace {

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

// Units that take part in the rows of a gate, row by row.
int32_t* count_recruited(const Runtime& rt, const Kernels& kernels, const uint64_t* gate, int64_t rows, int64_t k) {
  const PopcountRows p{gate, words_for(k), workspace<int32_t>(rt, rows)};
  share(rt, rows, p.words, [&](Range part) { kernels.popcount_rows(p, part); });
  return p.counts;
}
int64_t total(const int32_t* counts, int64_t rows) {
  int64_t sum = 0;
  for (int64_t row = 0; row < rows; ++row) sum += counts[row];
  return sum;
}

// Whether to split a product over these blocks, the better for reuse of the operand they stand for, or over the others.
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

bool pack_signs(const Runtime& rt, const PackSigns& p) {
  const Kernels& kernels = *active().load();
  std::atomic<bool> nan{false};
  share(rt, p.rows, p.K, [&](Range rows) {
    if (kernels.pack_signs(p, rows)) nan.store(true);
  });
  return nan.load();
}

void pack_window(const Runtime& rt, const PackWindow& p) {
  const Kernels& kernels = *active().load();
  share(rt, p.rows, p.K, [&](Range rows) { kernels.pack_window(p, rows); });
}

void unpack_signs(const Runtime& rt, const UnpackSigns& p) {
  const Kernels& kernels = *active().load();
  share(rt, p.rows, p.K, [&](Range rows) { kernels.unpack_signs(p, rows); });
}

void transpose_bits(const Runtime& rt, const TransposeBits& p) {
  const Kernels& kernels = *active().load();
  share(rt, ceil_div(p.K, kWordBits), p.rows * 8, [&](Range words) { kernels.transpose_bits(p, words); });
}

namespace {

void product(const Runtime& rt, const Kernels& kernels, const BinaryMatmul& operands) {
  PreparedMatmul p{operands, nullptr, nullptr};
  if (p.gate == nullptr) {
    p.x = without_padding(rt, p.x, p.M, p.K);
  } else {
    const int64_t rows = p.gate_stride == 0 ? 1 : p.M;
    p.gate = without_padding(rt, p.gate, rows, p.K);
    p.recruited = count_recruited(rt, kernels, p.gate, rows, p.K);
    const TileSamples tiled{p.x, p.gate,  p.gate_stride,
                            p.M, p.words, workspace<uint64_t>(rt, p.M * p.words * (1 + kernels.gate_parts))};
    share(rt, ceil_div(p.M, kernels.gated_tile), kernels.gated_tile * p.words,
          [&](Range tiles) { kernels.tile_samples(tiled, tiles); });
    p.tiles = tiled.tiles;
  }
  const int64_t panels = ceil_div(p.N, kernels.panel);
  if (enough_blocks(rt, panels) || panels >= p.M) {
    share(rt, panels, p.M * p.words * kernels.panel,
          [&](Range part) { kernels.binary_matmul(p, {{0, p.M}, items_of(part, kernels.panel, p.N)}); });
  } else {
    const int64_t tile = p.gate == nullptr ? 1 : kernels.gated_tile;
    share(rt, ceil_div(p.M, tile), tile * p.N * p.words,
          [&](Range tiles) { kernels.binary_matmul(p, {items_of(tiles, tile, p.M), {0, p.N}}); });
  }
}

const uint64_t* packed_flips(const Runtime& rt, const uint8_t* flip, int64_t n) {
  if (flip == nullptr) return nullptr;
  uint64_t* bits = workspace<uint64_t>(rt, words_for(n));
  for (int64_t word = 0; word < words_for(n); ++word) bits[word] = 0;
  for (int64_t i = 0; i < n; ++i) bits[i / kWordBits] |= static_cast<uint64_t>(flip[i] != 0) << (i % kWordBits);
  return bits;
}

void pack_values(const Runtime& rt, const Kernels& kernels, const PreparedSigns& p) {
  constexpr int64_t kAtOnce = 8;  // values of a vector, which is one step
  share(rt, p.M, p.N / kAtOnce, [&](Range rows) { kernels.value_signs(p, rows); });
}

}  // namespace

void binary_matmul(const Runtime& rt, const BinaryMatmul& p) {
  const Kernels& kernels = *active().load();
  if (p.y_bits == nullptr) return product(rt, kernels, p);  // an empty y has no address
  constexpr int64_t kSamples = 256;                         // whose products are held at a time
  BinaryMatmul part = p;
  part.y = workspace<int32_t>(rt, (p.M < kSamples ? p.M : kSamples) * p.N);
  const uint64_t* flips = packed_flips(rt, p.flip, p.N);
  for (int64_t m = 0; m < p.M; m += kSamples) {
    part.M = p.M - m < kSamples ? p.M - m : kSamples;
    part.x = p.x + m * p.words;
    part.gate = p.gate == nullptr ? nullptr : p.gate + m * p.gate_stride;
    part.y_bits = p.y_bits + m * words_for(p.N);
    product(rt, kernels, part);
    pack_values(rt, kernels, {{part.y, p.threshold, nullptr, part.M, p.N, part.y_bits}, flips});
  }
}

namespace {

// Densities of a gate above which the dense kernel is the faster one, as 1 / density.
constexpr int64_t kDenseInputGrad = 3, kDenseWeightGrad = 2;

// Shared out over rows where that leaves enough tiles for all threads, else over columns.
void dense_product(const Runtime& rt, const Kernels& kernels, const SignProduct& p) {
  constexpr int64_t kRows = 32, kColumns = 64;  // multiples of the kernel's tile
  const uint64_t* signs = p.signs_by_row ? transposed(rt, p.signs, p.I, p.V) : p.signs;
  const StridedSignProduct strided{p.a, p.element, p.I, 1, signs, nullptr, words_for(p.I), p.y, p.V, p.R, p.I, p.V};
  const int64_t row_blocks = ceil_div(p.R, kRows), column_blocks = ceil_div(p.V, kColumns);
  if (enough_blocks(rt, row_blocks) || row_blocks >= column_blocks) {
    share(rt, row_blocks, p.V * p.I,
          [&](Range part) { kernels.sign_product(strided, {items_of(part, kRows, p.R), {0, p.V}}); });
  } else {
    share(rt, column_blocks, p.R * p.I,
          [&](Range part) { kernels.sign_product(strided, {{0, p.R}, items_of(part, kColumns, p.V)}); });
  }
}

// With a mask, by whichever kernel is the faster at its density.
void masked_product(const Runtime& rt, const Kernels& kernels, const SignProduct& p) {
  const int64_t mask_rows = p.mask_stride == 0 ? 1 : p.R;
  const uint64_t* mask = without_padding(rt, p.mask, mask_rows, p.V);
  const int64_t taking_part = total(count_recruited(rt, kernels, mask, mask_rows, p.V), mask_rows);
  auto* y = static_cast<float*>(p.y);
  if (kDenseInputGrad * taking_part > mask_rows * p.V) {
    dense_product(rt, kernels, p);
    const ZeroUnrecruited rest{y, p.V, mask, p.mask_stride};
    share(rt, p.R, p.V, [&](Range rows) { kernels.zero_unrecruited(rest, rows); });
    return;
  }
  const uint64_t* w_t = transposed(rt, p.signs, p.I, p.V);
  const GatedInputGrad grad{static_cast<const float*>(p.a), w_t, mask, p.mask_stride, y, p.R, p.I, p.V};
  share(rt, p.R, p.V + taking_part / (mask_rows < 1 ? 1 : mask_rows) * ceil_div(p.I, 16),
        [&](Range rows) { kernels.gated_input_grad(grad, rows); });
}

// Gradients of hidden weights are made in blocks of this many outputs: a multiple of the kernels' tiles.
constexpr int64_t kGradOutputs = 64;

// Calls make(block) on blocks of a gradient of N outputs and K units over M samples.
template <typename Make>
void share_gradient(const Runtime& rt, int64_t M, int64_t N, int64_t K, const Make& make) {
  constexpr int64_t kUnits = 256;  // of a block at least, so that their tables are worth making
  const int64_t outputs = ceil_div(N, kGradOutputs);
  const int64_t parts = enough_blocks(rt, outputs) ? 1 : ceil_div(4 * rt.threads, outputs < 1 ? 1 : outputs);
  const int64_t even = ceil_div(ceil_div(K, parts), kWordBits) * kWordBits, units = even > kUnits ? even : kUnits;
  const int64_t blocks = ceil_div(K, units);
  share(rt, outputs * blocks, M * units * 8, [&](Range part) {
    for (int64_t i = part.begin; i < part.end; ++i)
      make({items_of({i / blocks, i / blocks + 1}, kGradOutputs, N), items_of({i % blocks, i % blocks + 1}, units, K)});
  });
}

// Gradients of outputs: that of output n for sample m lies at data[m * stride + n].
struct Outputs {
  const float* data;
  int64_t stride;
};

// The gradient of a hidden weight, made block by block by whichever kernel is the faster at this density of the gate.
// Outputs are the rows of the product, units its columns, samples what it contracts.
class WeightGrad {
 public:
  WeightGrad(const Runtime& rt, const Kernels& kernels, const SignProduct& p) : kernels_(kernels) {
    const int64_t M = p.I, N = p.R, K = p.V, words = words_for(K), rows = p.gate_stride == 0 ? 1 : M;
    const auto* d = static_cast<const float*>(p.a);
    own_d_ = {d, N};
    dense_ = {d, Element::kFloat32, 1, N, nullptr, nullptr, words_for(M), nullptr, 0, N, M, K};
    if (p.gate == nullptr) {
      dense_.plus = transposed(rt, p.signs, M, K);
      return;
    }
    const uint64_t* gate = without_padding(rt, p.gate, rows, K);
    if (kDenseWeightGrad * total(count_recruited(rt, kernels, gate, rows, K), rows) <= rows * K) {
      const int64_t chunks = ceil_div(M, kSampleChunk), lists = chunks * words;
      auto* starts = workspace<int64_t>(rt, lists);
      const int64_t entries = begin_lists(gate, p.gate_stride, M, words, starts);
      sparse_.x = p.signs, sparse_.gate = gate, sparse_.gate_stride = p.gate_stride;
      sparse_.starts = starts, sparse_.lists = workspace<uint16_t>(rt, entries);
      sparse_.order = workspace<uint8_t>(rt, lists * kWordBits);
      sparse_.steps = workspace<uint8_t>(rt, lists * kWordBits);
      sparse_.M = M, sparse_.K = K, sparse_.words = words;
      share(rt, ceil_div(K, kWordBits), M * 16, [&](Range part) { kernels.list_samples(sparse_, part); });
      return;
    }
    uint64_t* recruited_signs = workspace<uint64_t>(rt, M * words);
    for (int sign = 0; sign < 2; ++sign) {
      share(rt, M, words, [&](Range samples) {
        for (int64_t m = samples.begin; m < samples.end; ++m)
          for (int64_t word = 0; word < words; ++word) {
            const uint64_t x = p.signs[m * words + word], g = gate[m * p.gate_stride + word];
            recruited_signs[m * words + word] = (sign == 0 ? x : ~x) & g;
          }
      });
      (sign == 0 ? dense_.plus : dense_.minus) = transposed(rt, recruited_signs, M, K);
    }
  }

  // Element (n, k) of the block goes to dw[(n - its first row) * dw_stride + k - its first column].
  void make(Block block, float* dw, int64_t dw_stride) const { make(own_d_, block, dw, dw_stride); }
  // The same from the gradient of other outputs in the place of d.
  void make(Outputs d, Block block, float* dw, int64_t dw_stride) const {
    if (sparse_.lists != nullptr) {
      GatedWeightGrad p = sparse_;
      p.d = d.data, p.d_stride = d.stride, p.dw = dw, p.dw_stride = dw_stride;
      return kernels_.gated_weight_grad(p, block);
    }
    const auto [outputs, units] = block;
    StridedSignProduct p = dense_;
    p.a = d.data + outputs.begin, p.i_stride = d.stride;
    p.plus += units.begin * p.words;
    if (p.minus != nullptr) p.minus += units.begin * p.words;
    p.y = dw, p.y_stride = dw_stride;
    p.R = outputs.end - outputs.begin, p.V = units.end - units.begin;
    kernels_.sign_product(p, {{0, p.R}, {0, p.V}});
  }

 private:
  // Where the lists of each chunk of samples and word of units begin. Returns their end.
  static int64_t begin_lists(const uint64_t* gate, int64_t gate_stride, int64_t M, int64_t words, int64_t* starts) {
    int64_t end = 0;
    for (int64_t first = 0; first < M; first += kSampleChunk) {
      const int64_t last = lesser(M, first + kSampleChunk);
      for (int64_t word = 0; word < words; ++word) {
        int64_t recruited = 0;
        for (int64_t m = first; m < last; ++m) recruited += __builtin_popcountll(gate[m * gate_stride + word]);
        *starts++ = end;
        end += list_entries(recruited, last - first);
      }
    }
    return end;
  }

  const Kernels& kernels_;
  Outputs own_d_{};
  StridedSignProduct dense_{};
  GatedWeightGrad sparse_{};
};

}  // namespace

void sign_product(const Runtime& rt, const SignProduct& p) {
  const Kernels& kernels = *active().load();
  if (p.mask != nullptr) return masked_product(rt, kernels, p);
  if (!p.a_transposed) return dense_product(rt, kernels, p);
  const WeightGrad gradient(rt, kernels, p);
  share_gradient(rt, p.I, p.R, p.V, [&](Block block) {
    gradient.make(block, static_cast<float*>(p.y) + block.rows.begin * p.V + block.columns.begin, p.V);
  });
}

void grouped_product(const Runtime& rt, const GroupedProduct& p, const uint64_t* signs) {
  const Kernels& kernels = *active().load();
  if (kernels.grouped_product == nullptr) {
    SignProduct plain{};
    plain.a = p.x, plain.element = Element::kUint8, plain.signs = signs, plain.y = p.y;
    plain.R = p.M, plain.I = p.K, plain.V = p.N;
    return sign_product(rt, plain);
  }
  constexpr int64_t kSamples = 3, kLookUps = 64;  // samples taken together, and products of a look-up and its addition
  const int64_t blocks = ceil_div(p.N, kGroupedRows), triples = ceil_div(p.M, kSamples);
  if (enough_blocks(rt, triples) || triples >= blocks) {
    share(rt, triples, p.N * p.K / kLookUps,
          [&](Range part) { kernels.grouped_product(p, {items_of(part, kSamples, p.M), {0, p.N}}); });
  } else {
    share(rt, blocks, p.M * p.K * kGroupedRows / kLookUps,
          [&](Range part) { kernels.grouped_product(p, {{0, p.M}, items_of(part, kGroupedRows, p.N)}); });
  }
}

void value_signs(const Runtime& rt, const ValueSigns& p) {
  pack_values(rt, *active().load(), {p, packed_flips(rt, p.flip, p.N)});
}

void prepared_signs(const Runtime& rt, const PreparedSigns& p) { pack_values(rt, *active().load(), p); }

void scale_values(const Runtime& rt, const ScaleValues& p) {
  const Kernels& kernels = *active().load();
  share(rt, p.M, p.N * (p.factor_count + 2) / 8, [&](Range rows) { kernels.scale_values(p, rows); });
}

void top_units(const Runtime& rt, const TopUnits& p) {
  const Kernels& kernels = *active().load();
  share(rt, p.M, p.K, [&](Range rows) { kernels.top_units(p, rows); });
}

void standardise(const Runtime& rt, const Standardise& p) {
  const Kernels& kernels = *active().load();
  share(rt, p.M, p.N, [&](Range rows) { kernels.standardise(p, rows); });
}

void standardise_grad(const Runtime& rt, const StandardiseGrad& p) {
  const Kernels& kernels = *active().load();
  share(rt, p.M, p.N, [&](Range rows) { kernels.standardise_grad(p, rows); });
}

bool sample_engram(const Runtime& rt, SampleEngram p) {
  const Kernels& kernels = *active().load();
  const int64_t shares = rt.threads < p.M ? rt.threads : p.M;
  const int64_t keys = ceil_div(p.K, kWordBits) * kWordBits;  // made by words of units
  p.keys = p.bernoulli ? nullptr : workspace<uint32_t>(rt, shares * keys);
  std::atomic<bool> nan{false};
  share(rt, shares, shares == 0 ? 1 : p.M * p.K * 16 / shares, [&](Range part) {
    for (int64_t i = part.begin; i < part.end; ++i) {
      SampleEngram own = p;
      if (!p.bernoulli) own.keys += i * keys;
      if (kernels.sample_engram(own, {p.M * i / shares, p.M * (i + 1) / shares})) nan.store(true);
    }
  });
  return nan.load();
}

bool metaplastic_adam(const Runtime& rt, const MetaplasticAdam& p) {
  const Kernels& kernels = *active().load();
  std::atomic<bool> nan{false};
  share(rt, p.N * ceil_div(p.K, kWordBits), kWordBits * 4, [&](Range words) {
    if (kernels.metaplastic_adam(p, words)) nan.store(true);
  });
  return nan.load();
}

void real_weight_grad(const Runtime& rt, const RealWeightGrad& p, int64_t N) {
  const Kernels& kernels = *active().load();
  share_gradient(rt, p.M, N, p.K, [&](Block block) {
    RealWeightGrad own = p;
    own.dw += block.rows.begin * p.K + block.columns.begin, own.dw_stride = p.K;
    kernels.real_weight_grad(own, block);
  });
}

namespace {

// A step with a gradient of d [M, N], made and consumed block by block: make(d, block, dw, dw_stride) writes a block.
//
// The columns of d that a block of outputs needs are copied to one place: rows a power of two apart share sets of the
// cache. Reading them takes long but little work, so that it is done, sample by sample, while the weights of the block
// before are updated.
template <typename Make>
bool update_by_blocks(const Runtime& rt, const Kernels& kernels, const float* d, int64_t M, const MetaplasticAdam& p,
                      const Make& make) {
  constexpr int64_t kUnits = 512;           // of a block of the gradient, which stays in the second-level cache
  constexpr int64_t kStride = kUnits + 16;  // see above
  const int64_t blocks = ceil_div(p.N, kGradOutputs), used = ceil_div(p.K, kWordBits);
  std::atomic<bool> nan{false};
  const auto outputs_of = [&](int64_t block) { return items_of({block, block + 1}, kGradOutputs, p.N); };
  const auto copy_sample = [&](Range outputs, int64_t m, float* to) {
    memcpy(to + m * kGradOutputs, d + m * p.N + outputs.begin,
           static_cast<size_t>(outputs.end - outputs.begin) * kFloatBytes);
  };
  const auto update_blocks = [&](Range part, float* dw) {
    float *own = dw + kGradOutputs * kStride, *next = own + kGradOutputs * M;
    int64_t copied = 0;  // samples of the next block
    for (int64_t block = part.begin; block < part.end; ++block) {
      const Range outputs = outputs_of(block);
      for (; copied < M; ++copied) copy_sample(outputs, copied, next);
      std::swap(own, next);
      copied = block + 1 < part.end ? 0 : M;
      for (int64_t k = 0; k < p.K; k += kUnits) {
        const int64_t k_end = lesser(k + kUnits, p.K);
        make(Outputs{own, kGradOutputs}, Block{{0, outputs.end - outputs.begin}, {k, k_end}}, dw, kStride);
        MetaplasticAdam step = p;
        step.grad = dw, step.grad_element = Element::kFloat32;
        step.grad_stride = kStride, step.grad_row = outputs.begin, step.grad_unit = k;
        step.ahead = p.K;  // the next row: pieces of rows are too short for the processor to foresee it
        for (int64_t n = outputs.begin; n < outputs.end; ++n) {
          if (copied < M) copy_sample(outputs_of(block + 1), copied++, next);
          if (kernels.metaplastic_adam(step, {n * used + k / kWordBits, n * used + ceil_div(k_end, kWordBits)}))
            nan.store(true);
        }
      }
    }
  };
  const int64_t shares = lesser(rt.threads, blocks), scratch = kGradOutputs * (kStride + 2 * M);
  auto* memory = workspace<float>(rt, shares * scratch);
  share(rt, shares, shares == 0 ? 1 : p.N * p.K / shares * (M + 8), [&](Range part) {
    for (int64_t i = part.begin; i < part.end; ++i)
      update_blocks({blocks * i / shares, blocks * (i + 1) / shares}, memory + i * scratch);
  });
  return nan.load();
}

}  // namespace

bool gated_metaplastic_adam(const Runtime& rt, const SignProduct& gradient, const MetaplasticAdam& p) {
  const Kernels& kernels = *active().load();
  const WeightGrad blockwise(rt, kernels, gradient);
  return update_by_blocks(
      rt, kernels, static_cast<const float*>(gradient.a), gradient.I, p,
      [&](Outputs d, Block block, float* dw, int64_t dw_stride) { blockwise.make(d, block, dw, dw_stride); });
}

bool real_metaplastic_adam(const Runtime& rt, RealWeightGrad gradient, const MetaplasticAdam& p) {
  const Kernels& kernels = *active().load();
  return update_by_blocks(
      rt, kernels, gradient.d, gradient.M, p, [&](Outputs d, Block block, float* dw, int64_t dw_stride) {
        const auto [outputs, units] = block;
        RealWeightGrad own = gradient;
        own.d = d.data + outputs.begin, own.d_stride = d.stride, own.x += units.begin;
        own.dw = dw, own.dw_stride = dw_stride;
        kernels.real_weight_grad(own, {{0, outputs.end - outputs.begin}, {0, units.end - units.begin}});
      });
}

}  // namespace engram::cpu
