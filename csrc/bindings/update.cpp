// The metaplastic updates. On CUDA they are engram_kernels/triton_kernels, which has their arguments checked here.
#include "bindings/update.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <utility>
#include <vector>

#include "bindings/tensors.h"
#include "core/bits.h"
#include "core/compact.h"
#include "cpu/launch.h"

namespace engram::bindings {

namespace {

template <typename T>
constexpr const char* kSchemaType = nullptr;
template <>
constexpr const char* kSchemaType<double> = "float";
template <>
constexpr const char* kSchemaType<int64_t> = "int";

class SchemaText {
 public:
  SchemaText(const char* first, bool in_place) : text_(first), in_place_(in_place) {}

  void add(const char* text) { text_ += text; }
  template <typename T>
  void add_argument(bool written, const char* name, const char* standard) {
    text_ += ", ";
    if constexpr (std::is_same_v<T, Tensor> || std::is_same_v<T, std::optional<Tensor>>) {
      text_ += "Tensor";
      if (written && in_place_) text_ += {'(', alias_++, '!', ')'};
      if (std::is_same_v<T, std::optional<Tensor>>) text_ += '?';
    } else {
      text_ += kSchemaType<T>;
    }
    text_ += ' ';
    text_ += name;
    text_ += standard;
  }
  const std::string& text() const { return text_; }

 private:
  std::string text_;
  bool in_place_;
  char alias_ = 'b';  // 'a' is the weight
};

// The values of a call, in the order of its schema.
class Stack {
 public:
  explicit Stack(const StableIValue* values) : next_(values) {}
  template <typename T>
  T take() {
    return torch::stable::detail::to<T>(*next_++);
  }
  UpdateArguments take_update(Tensor weight) {
#define ENGRAM_TAKE(written, Type, name, standard) take<Type>(),
    return {std::move(weight), ENGRAM_UPDATE_STATE(ENGRAM_TAKE) ENGRAM_UPDATE_SETTINGS(ENGRAM_TAKE)};
#undef ENGRAM_TAKE
  }

 private:
  const StableIValue* next_;
};

// Infinity times a weight of 0 would be a NaN.
constexpr double kMostMetaplasticity = 1e38;

// What all updates do, except for the gradient; tensors on any device, if it is the weight's. `read` are contiguous
// tensors that the update reads.
cpu::MetaplasticAdam check_update(UpdateArguments& u, std::initializer_list<Named> read) {
  const Place place = place_of("weight", u.weight);
  check_place("exp_avg", u.exp_avg, place);
  const ScalarType weight_dtype = u.weight.scalar_type(), state_dtype = u.exp_avg.scalar_type();
  require(weight_dtype == ScalarType::Float || weight_dtype == ScalarType::BFloat16,
          "weight: expected float32 or bfloat16, got ", describe(u.weight));
  require(u.weight.dim() == 2, "weight: expected 2 dimensions, got ", describe(u.weight));
  check_units("weight", u.weight);
  const int64_t N = u.weight.size(0), K = u.weight.size(1);
  const auto check = [&](const char* name, const Tensor& t, ScalarType dtype, int64_t rows, int64_t columns) {
    check_place(name, t, place);
    require(t.scalar_type() == dtype && t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name, ": expected ",
            dtype_name(dtype), " (", rows, ", ", columns, "), got ", describe(t));
    require(
        t.is_contiguous() && aligned(t, static_cast<uintptr_t>(t.element_size())), name,
        ": expected contiguous memory that is aligned to its dtype, to update it in place, got a view of other data");
  };
  check("weight", u.weight, weight_dtype, N, K);
  require(state_dtype == ScalarType::Float || state_dtype == ScalarType::BFloat16 || state_dtype == ScalarType::Char,
          "exp_avg: expected float32, bfloat16 or int8, got ", describe(u.exp_avg));
  const bool scaled = state_dtype == ScalarType::Char;
  check("exp_avg", u.exp_avg, state_dtype, N, K);
  check("exp_avg_sq", u.exp_avg_sq, scaled ? ScalarType::Byte : state_dtype, N, K);
  require(scaled == u.exp_avg_scale.has_value(), "exp_avg_scale: expected ", scaled ? "a tensor" : "None", " for ",
          dtype_name(state_dtype), " moments");
  require(scaled == u.exp_avg_sq_scale.has_value(), "exp_avg_sq_scale: expected ", scaled ? "a tensor" : "None",
          " for ", dtype_name(state_dtype), " moments");
  if (scaled) {
    const int64_t blocks = ceil_div(K, kScaleBlock);
    check("exp_avg_scale", *u.exp_avg_scale, ScalarType::Float, N, blocks);
    check("exp_avg_sq_scale", *u.exp_avg_sq_scale, ScalarType::Float, N, blocks);
  }
  const bool rounds = weight_dtype != ScalarType::Float || state_dtype != ScalarType::Float;
  require(!rounds || u.seed.has_value(), "seed: expected int64 (2,) to round compact numbers with, got None");
  const Seed key = u.seed ? check_seed(*u.seed) : Seed{};
  require(u.first_row >= 0, "first_row: expected at least 0, got ", u.first_row);
  if (u.sign_bits) check("sign_bits", *u.sign_bits, ScalarType::Long, N, words_for(K));
  require(u.lr >= 0 && std::isfinite(u.lr), "lr: expected a finite number of at least 0, got ", u.lr);
  require(u.beta1 >= 0 && u.beta1 < 1, "beta1: expected in [0, 1), got ", u.beta1);
  require(u.beta2 >= 0 && u.beta2 < 1, "beta2: expected in [0, 1), got ", u.beta2);
  require(u.eps >= 0, "eps: expected at least 0, got ", u.eps);
  require(u.weight_decay >= 0 && std::isfinite(u.weight_decay),
          "weight_decay: expected a finite number of at least 0, got ", u.weight_decay);
  require(u.metaplasticity >= 0, "metaplasticity: expected at least 0, got ", u.metaplasticity);
  const auto float_bound = static_cast<float>(u.weight_bound);
  require(float_bound > 0, "weight_bound: expected above 0 in float32, got ", u.weight_bound);
  require(u.step >= 1, "step: expected at least 1, got ", u.step);
  check_apart({{"weight", &u.weight},
               {"exp_avg", &u.exp_avg},
               {"exp_avg_sq", &u.exp_avg_sq},
               {"sign_bits", address(u.sign_bits)},
               {"exp_avg_scale", address(u.exp_avg_scale)},
               {"exp_avg_sq_scale", address(u.exp_avg_sq_scale)}},
              read);
  const double t = static_cast<double>(u.step);
  const double step_size = u.lr * std::sqrt(1 - std::pow(u.beta2, t)) / (1 - std::pow(u.beta1, t));
  cpu::MetaplasticAdam p{};
  p.weight = u.weight.mutable_data_ptr();
  p.weight_element = element_of(weight_dtype);
  p.exp_avg = u.exp_avg.mutable_data_ptr();
  p.exp_avg_sq = u.exp_avg_sq.mutable_data_ptr();
  p.moments = scaled                             ? cpu::Moments::kScaled
              : state_dtype == ScalarType::Float ? cpu::Moments::kFloat32
                                                 : cpu::Moments::kBFloat16;
  p.exp_avg_scale = scaled ? static_cast<float*>(u.exp_avg_scale->mutable_data_ptr()) : nullptr;
  p.exp_avg_sq_scale = scaled ? static_cast<float*>(u.exp_avg_sq_scale->mutable_data_ptr()) : nullptr;
  p.sign_bits = u.sign_bits ? static_cast<uint64_t*>(u.sign_bits->mutable_data_ptr()) : nullptr;
  p.N = N, p.K = K, p.words = words_for(K);
  p.beta1 = static_cast<float>(u.beta1), p.one_minus_beta1 = static_cast<float>(1 - u.beta1);
  p.beta2 = static_cast<float>(u.beta2), p.one_minus_beta2 = static_cast<float>(1 - u.beta2);
  p.eps = static_cast<float>(u.eps), p.weight_decay = static_cast<float>(u.weight_decay);
  p.metaplasticity =
      static_cast<float>(u.metaplasticity < kMostMetaplasticity ? u.metaplasticity : kMostMetaplasticity);
  p.step_size = static_cast<float>(step_size);
  p.weight_bound = float_bound;
  p.rounding = rounding_key(key.key, key.offset), p.first_row = static_cast<uint64_t>(u.first_row);
  return p;
}

void check_grad(const Tensor& grad, const Tensor& weight) {
  check_place("grad", grad, place_of("weight", weight));
  require((grad.scalar_type() == ScalarType::Float || grad.scalar_type() == weight.scalar_type()) && grad.dim() == 2 &&
              grad.size(0) == weight.size(0) && grad.size(1) == weight.size(1),
          "grad: expected float32 or the weight's dtype, in the weight's shape ", describe(weight), ", got ",
          describe(grad));
}

// For updates outside this library: checks as metaplastic_adam_ does. Returns the numbers of MetaplasticAdam in their
// order there, as every backend takes them, and the four words of the rounding key.
std::vector<double> check_update_of(Stack stack) {
  Tensor weight = stack.take<Tensor>();
  const auto grad = stack.take<std::optional<Tensor>>();
  UpdateArguments u = stack.take_update(std::move(weight));
  const cpu::MetaplasticAdam p = check_update(u, {{"grad", address(grad)}});
  if (grad) check_grad(*grad, u.weight);
  const std::vector<double> key(p.rounding.word, p.rounding.word + 4);
  return {p.beta1,
          p.one_minus_beta1,
          p.beta2,
          p.one_minus_beta2,
          p.eps,
          p.weight_decay,
          p.metaplasticity,
          p.step_size,
          p.weight_bound,
          key[0],
          key[1],
          key[2],
          key[3]};
}

constexpr const char* kNotFinite =
    "grad: expected finite steps, got NaN or infinity; those weights were left as they were";

// A step with a gradient that lies in memory.
cpu::MetaplasticAdam with_gradient(UpdateArguments& u, const Tensor& grad) {
  cpu::MetaplasticAdam p = check_update(u, {{"grad", &grad}});
  check_grad(grad, u.weight);
  p.grad = grad.const_data_ptr();
  p.grad_element = element_of(grad.scalar_type());
  p.grad_stride = p.K;
  return p;
}

void metaplastic_adam_(Stack stack) {
  Tensor weight = stack.take<Tensor>();
  const Tensor grad = stack.take<Tensor>();
  UpdateArguments u = stack.take_update(std::move(weight));
  check_place("grad", grad, place_of("weight", u.weight));
  const Tensor g = as_contiguous(grad);
  TorchRuntime rt;
  require(!cpu::metaplastic_adam(rt.get(), with_gradient(u, g)), kNotFinite);
}

// The number of steps that a weight has taken, to be counted on.
int64_t* check_step(const Tensor& step) {
  require(step.scalar_type() == ScalarType::Long && step.numel() == 1 && step.is_cpu(),
          "step: expected int64 () on the CPU, got ", describe(step));
  return static_cast<int64_t*>(step.mutable_data_ptr());
}

// One step of many parameters, whose moments are float32: a call of torch's takes longer than the update of a small
// layer. The first ones, as many as there are sign bits, as metaplastic_adam_; those after them, of any shape, by
// torch's Adam, whose eps is added to the corrected root. Each has taken `steps` of its own, int64 on the CPU, which
// count this one too. Returns the number of the first one whose step is not finite, after which none was updated, or
// -1.
int64_t update_all(const std::vector<Tensor>& weights, const std::vector<Tensor>& grads,
                   const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs,
                   const std::vector<Tensor>& sign_bits, const std::vector<Tensor>& steps, double lr, double beta1,
                   double beta2, double eps, double weight_decay, double metaplasticity, double weight_bound) {
  const size_t count = weights.size(), hidden = sign_bits.size();
  require(grads.size() == count && exp_avgs.size() == count && exp_avg_sqs.size() == count && steps.size() == count &&
              hidden <= count,
          "weight: expected as many of all, got ", count, " weights");
  for (size_t i = 0; i < count; ++i) {
    const bool plain = i >= hidden;
    const auto rows = [plain](const Tensor& t) { return plain ? as_one_row(t) : t; };
    int64_t* step = check_step(steps[i]);
    if (weights[i].numel() == 0) {
      ++*step;
      continue;
    }
    const Tensor grad = rows(as_contiguous(grads[i]));
    UpdateArguments u{};
    u.weight = rows(weights[i]), u.exp_avg = rows(exp_avgs[i]), u.exp_avg_sq = rows(exp_avg_sqs[i]);
    if (!plain) u.sign_bits = sign_bits[i];
    u.lr = lr, u.beta1 = beta1, u.beta2 = beta2, u.weight_decay = weight_decay, u.step = *step + 1;
    u.eps = plain ? eps * std::sqrt(1 - std::pow(beta2, static_cast<double>(u.step))) : eps;
    u.metaplasticity = plain ? 0.0 : metaplasticity;
    u.weight_bound = plain ? HUGE_VAL : weight_bound;
    TorchRuntime rt;
    if (cpu::metaplastic_adam(rt.get(), with_gradient(u, grad))) return static_cast<int64_t>(i);
    ++*step;
  }
  return -1;
}

void update_from_bits(UpdateArguments& u, const Tensor& d, const Tensor& x_bits,
                      const std::optional<Tensor>& gate_bits) {
  const Place place = place_of("weight", u.weight);
  check_matrix("d", d, place);
  require(u.weight.dim() == 2, "weight: expected 2 dimensions, got ", describe(u.weight));
  check_units("weight", u.weight);
  const int64_t M = d.size(0), N = d.size(1), K = u.weight.size(1);
  check_packed("x_bits", x_bits, K, place);
  const int64_t stride = gate_bits ? check_gate("gate_bits", *gate_bits, M, K, place) : 0;
  const Tensor in = as_float32(d), x = as_packed(x_bits);
  const OptionalBits gate(gate_bits);
  const cpu::MetaplasticAdam p = check_update(u, {{"d", &in}, {"x_bits", &x}, {"gate_bits", gate.tensor()}});
  require(N == p.N, "d: expected shape (M, ", p.N, ") to meet the rows of the weight, got ", describe(d));
  require(x_bits.size(0) == M, "x_bits: expected ", M, " samples like d, got ", describe(x_bits));
  const SignProduct gradient{.a = in.const_data_ptr(),
                             .a_transposed = true,
                             .signs = packed_data(x),
                             .signs_by_row = true,
                             .gate = gate.data(),
                             .gate_stride = stride,
                             .R = N,
                             .I = M,
                             .V = K};
  TorchRuntime rt;
  require(!cpu::gated_metaplastic_adam(rt.get(), gradient, p), kNotFinite);
}

void update_from_numbers(UpdateArguments& u, const Tensor& d, const Tensor& x) {
  const Place place = place_of("weight", u.weight);
  check_matrix("d", d, place);
  check_matrix("x", x, place);
  require(u.weight.dim() == 2, "weight: expected 2 dimensions, got ", describe(u.weight));
  check_units("weight", u.weight);
  const Tensor outputs = as_float32(d), units = as_float32(x);
  const cpu::MetaplasticAdam p = check_update(u, {{"d", &outputs}, {"x", &units}});
  const int64_t M = d.size(0);
  require(d.size(1) == p.N, "d: expected shape (M, ", p.N, ") to meet the rows of the weight, got ", describe(d));
  require(x.size(0) == M && x.size(1) == p.K, "x: expected shape (", M, ", ", p.K,
          "), a row for each of d and a column for each of the weight, got ", describe(x));
  TorchRuntime rt;
  const cpu::RealWeightGrad gradient{
      .d = float_data(outputs), .d_stride = p.N, .x = float_data(units), .M = M, .K = p.K};
  require(!cpu::real_metaplastic_adam(rt.get(), gradient, p), kNotFinite);
}

void gated_metaplastic_adam_(Stack stack) {
  const Tensor d = stack.take<Tensor>(), x_bits = stack.take<Tensor>();
  const auto gate_bits = stack.take<std::optional<Tensor>>();
  Tensor weight = stack.take<Tensor>();
  UpdateArguments u = stack.take_update(std::move(weight));
  update_from_bits(u, d, x_bits, gate_bits);
}

void real_metaplastic_adam_(Stack stack) {
  const Tensor d = stack.take<Tensor>(), x = stack.take<Tensor>();
  Tensor weight = stack.take<Tensor>();
  UpdateArguments u = stack.take_update(std::move(weight));
  update_from_numbers(u, d, x);
}

// One of the two, by the dtype of x, of a weight whose moments are float32: arguments with names and defaults take
// longer to pass than a small layer to update. `step` counts the steps before it and this one.
void update_from_layer(const Tensor& d, const Tensor& x, std::optional<Tensor> gate_bits, const Tensor& weight,
                       const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& sign_bits, const Tensor& step,
                       double lr, double beta1, double beta2, double eps, double weight_decay, double metaplasticity,
                       double weight_bound) {
  int64_t* steps = check_step(step);
  UpdateArguments u{};
  u.weight = weight, u.exp_avg = exp_avg, u.exp_avg_sq = exp_avg_sq, u.sign_bits = sign_bits;
  u.lr = lr, u.beta1 = beta1, u.beta2 = beta2, u.eps = eps, u.weight_decay = weight_decay;
  u.metaplasticity = metaplasticity, u.weight_bound = weight_bound, u.step = *steps + 1;
  if (x.scalar_type() == ScalarType::Long)
    update_from_bits(u, d, x, gate_bits);
  else
    update_from_numbers(u, d, x);
  ++*steps;
}

// How torch calls an operator that unpacks its arguments itself.
template <auto kOperator>
void boxed(StableIValue* stack, uint64_t, uint64_t n_results) {
  if constexpr (std::is_void_v<decltype(kOperator(Stack(stack)))>)
    kOperator(Stack(stack));
  else
    stack[0] = torch::stable::detail::from(kOperator(Stack(stack)));
}

}  // namespace

std::string update_schema(const char* first, bool in_place, const char* result) {
  SchemaText schema(first, in_place);
#define ENGRAM_ADD(written, Type, name, standard) schema.add_argument<Type>(written, #name, standard);
  ENGRAM_UPDATE_STATE(ENGRAM_ADD)
  schema.add(", *");
  ENGRAM_UPDATE_SETTINGS(ENGRAM_ADD)
#undef ENGRAM_ADD
  schema.add(") -> ");
  schema.add(result);
  return schema.text();
}

STABLE_TORCH_LIBRARY_IMPL(engram_kernels, CPU, m) {
  m.impl("metaplastic_adam_", &boxed<&metaplastic_adam_>);
  m.impl("gated_metaplastic_adam_", &boxed<&gated_metaplastic_adam_>);
  m.impl("real_metaplastic_adam_", &boxed<&real_metaplastic_adam_>);
  m.impl("_update_all", TORCH_BOX(&update_all));
  m.impl("_update_from_layer", TORCH_BOX(&update_from_layer));
}

STABLE_TORCH_LIBRARY_IMPL(engram_kernels, CompositeExplicitAutograd, m) {
  m.impl("_check_update", &boxed<&check_update_of>);
}

}  // namespace engram::bindings
