// Runs the operators of csrc/cpu/launch.h on cases from a pipe: what tests/test_cross.py executes under emulation of
// another processor, where there is no torch.
//
//   kernel_runner ISA < cases > results
//
// A case is the number of its operator (enum Operator), then its fields in the order in which run() takes them. A field
// is an int64 number of bytes and the bytes; an array of no bytes stands for a null pointer. Results are fields too.
// Exit status: 2 unknown ISA, 3 malformed case, 4 a kernel wrote outside its arrays.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "core/bits.h"
#include "core/window.h"
#include "cpu/launch.h"

namespace {

using namespace engram;
using namespace engram::cpu;

enum class Operator : int64_t {
  kPackSigns,
  kPackWindow,
  kUnpackSigns,
  kBinaryMatmul,
  kSignMatmul,
  kSignMatmulT,
  kMaskedInputGrad,
  kGatedWeightGrad,
  kRealWeightGrad,
  kSampleEngram,
  kMetaplasticAdam,
  kGatedMetaplasticAdam,
  kRealMetaplasticAdam,
  kUnfoldBits,
  kInterleaveBits,
  kBinaryConv2d,
  kMaskedConv2dInputGrad,
  kGatedConv2dWeightGrad,
  kPoolBits,
};

int64_t cases_begun = 0;

[[noreturn]] void fail(int status, const char* message) {
  fprintf(stderr, "kernel_runner: case %d: %s\n", static_cast<int>(cases_begun), message);
  exit(status);
}

// Arrays of one case. They start out as garbage (NaN, -1), so that a kernel which relies on zeros or leaves a gap is
// found out, and lie between guards, so that one which writes too far is.
class Memory {
 public:
  void* allocate(size_t bytes) {
    blocks_.emplace_back(bytes + 2 * kGuard, kGarbage);
    uint8_t* data = blocks_.back().data() + kGuard;
    memset(data - kGuard, kGuardByte, kGuard);
    memset(data + bytes, kGuardByte, kGuard);
    return data;
  }
  bool guards_intact() const {
    for (const std::vector<uint8_t>& block : blocks_)
      for (size_t i = 0; i < kGuard; ++i)
        if (block[i] != kGuardByte || block[block.size() - 1 - i] != kGuardByte) return false;
    return true;
  }

 private:
  static constexpr size_t kGuard = 64;  // keeps the alignment of the block
  static constexpr uint8_t kGarbage = 0xFF, kGuardByte = 0xA5;
  std::vector<std::vector<uint8_t>> blocks_;
};

class Case {
 public:
  // False at the end of the input.
  bool begin(Operator& op) {
    ++cases_begun;
    return fread(&op, sizeof op, 1, stdin) == 1;
  }

  template <typename T = void>
  T* array() {
    return static_cast<T*>(read_array().first);
  }
  // An array that an operator changes, and which is a result unless it is absent.
  template <typename T = void>
  T* updated_array() {
    const auto [data, bytes] = read_array();
    if (data != nullptr) results_.emplace_back(data, bytes);
    return static_cast<T*>(data);
  }
  template <typename T>
  T number() {
    T value;
    if (length() != sizeof value) fail(3, "a number of another size was expected");
    read(&value, sizeof value);
    return value;
  }
  int64_t integer() { return number<int64_t>(); }

  template <typename T = void>
  T* output(int64_t bytes) {
    void* data = memory_.allocate(static_cast<size_t>(bytes));
    results_.emplace_back(data, bytes);
    return static_cast<T*>(data);
  }
  void send_flag(bool flag) { *output<int64_t>(sizeof(int64_t)) = flag; }

  void end() {
    if (!memory_.guards_intact()) fail(4, "a kernel wrote outside its arrays");
    for (const auto& [data, bytes] : results_) {
      fwrite(&bytes, sizeof bytes, 1, stdout);
      fwrite(data, 1, static_cast<size_t>(bytes), stdout);
    }
  }

  // Ranges in two pieces, the second one first: no result may depend on how work is shared out.
  Runtime runtime() {
    return {[](int64_t count, int64_t, Runtime::Body body, void* context) {
              const int64_t middle = count / 2;
              body(middle, count, context);
              if (middle > 0) body(0, middle, context);
            },
            [](void* owner, size_t bytes) { return static_cast<Case*>(owner)->memory_.allocate(bytes); }, this, 2};
  }

 private:
  static void read(void* data, size_t bytes) {
    if (fread(data, 1, bytes, stdin) != bytes) fail(3, "the input ends within a case");
  }
  static int64_t length() {
    int64_t bytes;
    read(&bytes, sizeof bytes);
    return bytes;
  }
  std::pair<void*, int64_t> read_array() {
    const int64_t bytes = length();
    if (bytes == 0) return {nullptr, 0};
    void* data = memory_.allocate(static_cast<size_t>(bytes));
    read(data, static_cast<size_t>(bytes));
    return {data, bytes};
  }

  Memory memory_;
  std::vector<std::pair<const void*, int64_t>> results_;
};

// y = a s, float32 unless told otherwise.
SignProduct sign_product_of(int64_t R, int64_t I, int64_t V, bool signs_by_row) {
  SignProduct p{};
  p.R = R, p.I = I, p.V = V, p.signs_by_row = signs_by_row;
  return p;
}

// The gradient of a hidden weight, all but y.
SignProduct weight_grad_operands(Case& c) {
  const int64_t M = c.integer(), N = c.integer(), K = c.integer();
  SignProduct p = sign_product_of(N, M, K, true);
  p.a_transposed = true;
  p.gate_stride = c.integer();
  p.a = c.array<float>(), p.signs = c.array<uint64_t>(), p.gate = c.array<uint64_t>();
  return p;
}

// All but dw; returns N.
int64_t real_gradient_operands(Case& c, RealWeightGrad& p) {
  p.M = c.integer();
  const int64_t N = c.integer();
  p.K = c.integer(), p.d_stride = N;
  p.d = c.array<float>(), p.x = c.array<float>();
  return N;
}

Window window_of(Case& c) {
  Window w{};
  for (int64_t* number : {&w.height, &w.width, &w.channels, &w.kernel_h, &w.kernel_w, &w.stride_h, &w.stride_w, &w.top,
                          &w.bottom, &w.left, &w.right, &w.dilation_h, &w.dilation_w, &w.groups})
    *number = c.integer();
  return w;
}

// All but the gradient.
MetaplasticAdam update_operands(Case& c) {
  MetaplasticAdam p{};
  p.N = c.integer(), p.K = c.integer(), p.words = words_for(p.K);
  p.weight_element = static_cast<Element>(c.integer());
  p.moments = static_cast<Moments>(c.integer());
  for (float* setting : {&p.beta1, &p.one_minus_beta1, &p.beta2, &p.one_minus_beta2, &p.eps, &p.weight_decay,
                         &p.metaplasticity, &p.step_size, &p.weight_bound})
    *setting = c.number<float>();
  const auto seed = c.number<uint64_t>();
  p.rounding = rounding_key(seed, static_cast<uint32_t>(c.integer()));
  p.first_row = c.number<uint64_t>();
  p.weight = c.updated_array();
  p.exp_avg = c.updated_array(), p.exp_avg_sq = c.updated_array();
  p.exp_avg_scale = c.updated_array<float>(), p.exp_avg_sq_scale = c.updated_array<float>();
  p.sign_bits = c.updated_array<uint64_t>();
  return p;
}

void run(Case& c, Operator op) {
  const Runtime rt = c.runtime();
  constexpr int64_t kFloat = sizeof(float), kWord = sizeof(uint64_t);
  switch (op) {
    case Operator::kPackSigns: {
      PackSigns p{};
      p.element = static_cast<Element>(c.integer());
      p.rows = c.integer(), p.K = c.integer(), p.words = words_for(p.K);
      p.x = c.array();
      p.bits = c.output<uint64_t>(p.rows * p.words * kWord);
      return c.send_flag(pack_signs(rt, p));
    }
    case Operator::kPackWindow: {
      PackWindow p{};
      p.width = c.number<float>();
      p.rows = c.integer(), p.K = c.integer(), p.words = words_for(p.K), p.gate_stride = c.integer();
      p.x = c.array<float>(), p.gate = c.array<uint64_t>();
      p.bits = c.output<uint64_t>(p.rows * p.words * kWord);
      return pack_window(rt, p);
    }
    case Operator::kUnpackSigns: {
      UnpackSigns p{};
      p.rows = c.integer(), p.K = c.integer(), p.words = words_for(p.K), p.size = static_cast<int>(c.integer());
      p.plus = c.number<uint64_t>(), p.minus = c.number<uint64_t>();
      p.bits = c.array<uint64_t>();
      p.out = c.output(p.rows * p.K * p.size);
      return unpack_signs(rt, p);
    }
    case Operator::kBinaryMatmul: {
      BinaryMatmul p{};
      p.M = c.integer(), p.N = c.integer(), p.K = c.integer(), p.words = words_for(p.K), p.gate_stride = c.integer();
      p.x = c.array<uint64_t>(), p.w = c.array<uint64_t>(), p.gate = c.array<uint64_t>();
      p.y = c.output<int32_t>(p.M * p.N * static_cast<int64_t>(sizeof(int32_t)));
      return binary_matmul(rt, p);
    }
    case Operator::kSignMatmul: {
      const int64_t M = c.integer(), N = c.integer(), K = c.integer();
      SignProduct p = sign_product_of(M, N, K, true);
      p.a = c.array<float>(), p.signs = c.array<uint64_t>();
      p.y = c.output(M * K * kFloat);
      return sign_product(rt, p);
    }
    case Operator::kSignMatmulT: {
      const int64_t M = c.integer(), N = c.integer(), K = c.integer();
      SignProduct p = sign_product_of(M, K, N, false);
      if (c.integer() != 0) p.element = Element::kUint8;
      p.a = c.array(), p.signs = c.array<uint64_t>();
      static_assert(sizeof(float) == sizeof(int32_t));
      p.y = c.output(M * N * kFloat);
      return sign_product(rt, p);
    }
    case Operator::kMaskedInputGrad: {
      const int64_t M = c.integer(), N = c.integer(), K = c.integer();
      SignProduct p = sign_product_of(M, N, K, true);
      p.mask_stride = c.integer();
      p.a = c.array<float>(), p.signs = c.array<uint64_t>(), p.mask = c.array<uint64_t>();
      p.y = c.output(M * K * kFloat);
      return sign_product(rt, p);
    }
    case Operator::kGatedWeightGrad: {
      SignProduct p = weight_grad_operands(c);
      p.y = c.output(p.R * p.V * kFloat);
      return sign_product(rt, p);
    }
    case Operator::kRealWeightGrad: {
      RealWeightGrad p{};
      const int64_t N = real_gradient_operands(c, p);
      p.dw = c.output<float>(N * p.K * kFloat);
      return real_weight_grad(rt, p, N);
    }
    case Operator::kSampleEngram: {
      SampleEngram p{};
      p.M = c.integer(), p.K = c.integer(), p.words = words_for(p.K);
      p.bernoulli = c.integer() != 0;
      p.count = c.integer();
      p.threshold = c.number<uint64_t>();
      p.inverse_temperature = c.number<float>();
      p.seed = c.number<uint64_t>();
      p.offset = static_cast<uint32_t>(c.integer());
      p.first_row = c.number<uint64_t>(), p.row_step = c.number<uint64_t>();
      p.score = c.array<float>();
      p.gate = c.output<uint64_t>(p.M * p.words * kWord);
      return c.send_flag(sample_engram(rt, p));
    }
    case Operator::kMetaplasticAdam: {
      MetaplasticAdam p = update_operands(c);
      p.grad_element = static_cast<Element>(c.integer());
      p.grad_stride = c.integer();
      p.grad = c.array();
      return c.send_flag(metaplastic_adam(rt, p));
    }
    case Operator::kGatedMetaplasticAdam: {
      const MetaplasticAdam p = update_operands(c);
      return c.send_flag(gated_metaplastic_adam(rt, weight_grad_operands(c), p));
    }
    case Operator::kRealMetaplasticAdam: {
      const MetaplasticAdam p = update_operands(c);
      RealWeightGrad gradient{};
      real_gradient_operands(c, gradient);
      return c.send_flag(real_metaplastic_adam(rt, gradient, p));
    }
    case Operator::kUnfoldBits: {
      const Window w = window_of(c);
      const int64_t samples = c.integer(), group = c.integer(), words = words_for(group_units(w));
      const auto* bits = c.array<uint64_t>();
      auto* rows = c.output<uint64_t>(samples * out_pixels(w) * words * kWord);
      return unfold_bits(rt, {bits, samples, words_for(units(w)), w, group, rows, words});
    }
    case Operator::kInterleaveBits: {
      const int64_t samples = c.integer(), rows = c.integer(), k = c.integer();
      const auto* bits = c.array<uint64_t>();
      auto* out = c.output<uint64_t>(samples * words_for(rows * k) * kWord);
      return interleave_bits(rt, {bits, samples, rows, k, out});
    }
    case Operator::kPoolBits: {
      PoolBits p{};
      p.window = window_of(c);
      const int64_t samples = c.integer();
      p.bits = c.array<uint64_t>(), p.flip_bits = c.array<uint64_t>();
      p.out = c.output<uint64_t>(samples * words_for(out_pixels(p.window) * p.window.channels) * kWord);
      return pool_bits(rt, p, samples);
    }
    case Operator::kBinaryConv2d: {
      BinaryConv2d p{};
      p.window = window_of(c);
      p.samples = c.integer(), p.outputs = c.integer(), p.gate_stride = c.integer();
      p.scale = c.number<float>();
      p.x = c.array<uint64_t>(), p.w = c.array<uint64_t>(), p.gate = c.array<uint64_t>();
      p.y = c.output<float>(p.samples * out_pixels(p.window) * p.outputs * kFloat);
      return binary_conv2d(rt, p);
    }
    case Operator::kMaskedConv2dInputGrad: {
      MaskedConv2dInputGrad p{};
      p.window = window_of(c);
      p.samples = c.integer(), p.outputs = c.integer(), p.mask_stride = c.integer();
      p.scale = c.number<float>();
      p.d = c.array<float>(), p.w = c.array<uint64_t>(), p.mask = c.array<uint64_t>();
      p.dx = c.output<float>(p.samples * units(p.window) * kFloat);
      return masked_conv2d_input_grad(rt, p);
    }
    case Operator::kGatedConv2dWeightGrad: {
      GatedConv2dWeightGrad p{};
      p.window = window_of(c);
      p.samples = c.integer(), p.outputs = c.integer(), p.gate_stride = c.integer();
      p.scale = c.number<float>();
      p.d = c.array<float>(), p.x = c.array<uint64_t>(), p.gate = c.array<uint64_t>();
      p.dw = c.output<float>(p.outputs * group_units(p.window) * kFloat);
      return gated_conv2d_weight_grad(rt, p);
    }
  }
  fail(3, "unknown operator");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2 || !set_isa(argv[1])) fail(2, "expected the name of an instruction set of this build");
  for (;;) {
    Case c;
    Operator op;
    if (!c.begin(op)) return 0;
    run(c, op);
    c.end();
  }
}
