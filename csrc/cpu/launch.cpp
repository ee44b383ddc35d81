// Shares the work of each operator out among threads. No result depends on how: every output element is computed whole
// by one thread, in an order that the split does not change.
#include "cpu/launch.h"

#include <atomic>

#include "core/bits.h"

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
  if (__builtin_cpu_supports("avx2")) usable.push_back(&avx2::kernels);
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
      count, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<F*>(&f));
}

template <typename T>
T* workspace(const Runtime& rt, int64_t elements) {
  return static_cast<T*>(rt.allocate(rt.owner, static_cast<size_t>(elements) * sizeof(T)));
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
  if (p.gate != nullptr) {
    const int64_t rows = p.gate_stride == 0 ? 1 : p.M;
    int32_t* recruited = workspace<int32_t>(rt, rows);
    share(rt, rows, p.words,
          [&](int64_t begin, int64_t end) { kernels.popcount_rows(p.gate, p.words, recruited, begin, end); });
    p.recruited = recruited;
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

static const float* row_sums(const Runtime& rt, const Kernels& kernels, const float* a, int64_t rows, int64_t k) {
  float* sums = workspace<float>(rt, rows);
  share(rt, rows, k, [&](int64_t begin, int64_t end) { kernels.sum_rows(a, k, sums, begin, end); });
  return sums;
}

void sign_matmul(const Runtime& rt, SignMatmul p) {
  const Kernels& kernels = *active().load();
  p.a_sum = row_sums(rt, kernels, p.a, p.M, p.N);
  const int64_t used = ceil_div(p.K, kWordBits);
  if (enough_blocks(rt, used) || used >= p.M) {
    share(rt, used, p.M * p.N * 4, [&](int64_t begin, int64_t end) { kernels.sign_matmul(p, 0, p.M, begin, end); });
  } else {
    share(rt, p.M, p.N * p.words * 4, [&](int64_t begin, int64_t end) { kernels.sign_matmul(p, begin, end, 0, used); });
  }
}

void sign_matmul_t(const Runtime& rt, SignMatmul p) {
  const Kernels& kernels = *active().load();
  p.a_sum = row_sums(rt, kernels, p.a, p.M, p.K);
  if (p.N >= p.M)
    share(rt, p.N, p.M * ceil_div(p.K, 16),
          [&](int64_t begin, int64_t end) { kernels.sign_matmul_t(p, 0, p.M, begin, end); });
  else
    share(rt, p.M, p.N * ceil_div(p.K, 16),
          [&](int64_t begin, int64_t end) { kernels.sign_matmul_t(p, begin, end, 0, p.N); });
}

void masked_input_grad(const Runtime& rt, const float* d, const uint64_t* w, const uint64_t* mask, int64_t mask_stride,
                       float* dx, int64_t M, int64_t N, int64_t K) {
  const Kernels& kernels = *active().load();
  const int64_t words = words_for(K), mask_rows = mask_stride == 0 ? 1 : M;
  int32_t* recruited = workspace<int32_t>(rt, mask_rows);
  kernels.popcount_rows(mask, words, recruited, 0, mask_rows);
  int64_t taking_part = 0;
  for (int64_t row = 0; row < mask_rows; ++row) taking_part += recruited[row];
  if (2 * taking_part > mask_rows * K) {  // dense: sharing a word of W among samples beats skipping units
    SignMatmul p{d, nullptr, w, dx, M, N, K, words};
    sign_matmul(rt, p);
    share(rt, M, K,
          [&](int64_t begin, int64_t end) { kernels.zero_unrecruited(dx, K, mask, mask_stride, begin, end); });
    return;
  }
  uint64_t* w_t = workspace<uint64_t>(rt, K * words_for(N));
  share(rt, ceil_div(K, kWordBits), N * 8,
        [&](int64_t begin, int64_t end) { kernels.transpose_bits(w, N, K, w_t, begin, end); });
  const GatedInputGrad p{d, row_sums(rt, kernels, d, M, N), w_t, mask, mask_stride, dx, M, N, K};
  share(rt, M, K + taking_part / (mask_rows < 1 ? 1 : mask_rows) * ceil_div(N, 16),
        [&](int64_t begin, int64_t end) { kernels.gated_input_grad(p, begin, end); });
}

void gated_weight_grad(const Runtime& rt, GatedWeightGrad p) {
  constexpr int64_t kOutputs = 64;  // a thread's share is a multiple of the kernel's tile
  const Kernels& kernels = *active().load();
  p.lists = workspace<uint8_t>(rt, p.K * kSampleChunk);
  p.counts = workspace<int32_t>(rt, 2 * p.K);
  p.chunk_begin = 0;
  do {  // at least once: an empty batch has a gradient of zeros
    p.chunk_end = p.chunk_begin + kSampleChunk < p.M ? p.chunk_begin + kSampleChunk : p.M;
    const int64_t samples = p.chunk_end - p.chunk_begin;
    share(rt, ceil_div(p.K, kWordBits), samples * kWordBits,
          [&](int64_t begin, int64_t end) { kernels.list_samples(p, begin, end); });
    share(rt, ceil_div(p.N, kOutputs), (samples + 8) * p.K, [&](int64_t begin, int64_t end) {
      const int64_t n_end = end * kOutputs;
      kernels.gated_weight_grad(p, begin * kOutputs, n_end < p.N ? n_end : p.N);
    });
    p.chunk_begin = p.chunk_end;
  } while (p.chunk_begin < p.M);
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

}  // namespace engram::cpu
