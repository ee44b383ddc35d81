// What a linear layer computes forwards and backwards, a call each: on the CPU, in float32. A small layer spends more
// time between operators than in them. engram_kernels/autograd.py composes the same numbers of operators where these do
// not serve.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "bindings/bits.h"
#include "bindings/products.h"
#include "bindings/tensors.h"

namespace engram::bindings {

namespace {

// scale numbers[m,n] + bias[n], rounded after the product and after the sum. Floats are changed in place.
Tensor scaled_and_shifted(const Tensor& numbers, double scale, const std::optional<Tensor>& bias) {
  const int64_t M = numbers.size(0), N = numbers.size(1);
  require(!bias || (bias->scalar_type() == ScalarType::Float && bias->dim() == 1 && bias->size(0) == N),
          "bias: expected float32 (", N, ",), got ", describe(bias ? *bias : numbers));
  const bool whole = numbers.scalar_type() == ScalarType::Int;
  Tensor y = whole ? new_tensor({M, N}, ScalarType::Float, {}) : numbers;
  const auto factor = static_cast<float>(scale);
  const Tensor shift = bias ? as_contiguous(*bias) : y;
  TorchRuntime rt;
  cpu::scale_values(rt.get(), {.whole = whole ? static_cast<const int32_t*>(numbers.const_data_ptr()) : nullptr,
                               .real = whole ? nullptr : float_data(numbers),
                               .factors = &factor,
                               .factor_count = scale == 1.0 ? 0 : 1,
                               .scale = nullptr,
                               .shift = bias ? float_data(shift) : nullptr,
                               .M = M,
                               .N = N,
                               .y = data<float>(y)});
  return y;
}

// scale x s(W)^T + bias. With binary_input it is s(x) within the gate, and its bits come with the result, as does the
// mask of the units that pass a gradient where there is a window.
std::tuple<Tensor, Tensor, Tensor> layer(const Tensor& x, const Tensor& w_bits, std::optional<Tensor> gate_bits,
                                         std::optional<Tensor> bias, double scale, bool binary_input,
                                         std::optional<double> window) {
  require(x.scalar_type() == ScalarType::Float && x.dim() == 2, "x: expected float32 (M, K), got ", describe(x));
  const int64_t k = x.size(1);
  if (!binary_input) return {scaled_and_shifted(sign_matmul_t(x, w_bits, k, std::nullopt), scale, bias), {}, {}};
  const Tensor x_bits = pack_signs(x);
  const Tensor y = scaled_and_shifted(binary_matmul(x_bits, w_bits, k, gate_bits), scale, bias);
  return {y, x_bits, window ? pack_window(x, *window, gate_bits) : Tensor()};
}

Tensor sum_over_samples(const Tensor& d) {
  const int64_t M = d.size(0), N = d.size(1);
  Tensor sum = new_tensor({N}, ScalarType::Float, {});
  if (M == 1) {
    std::copy_n(float_data(d), N, data<float>(sum));
    return sum;
  }
  // as the gradient of a weight of one input whose sign is + in every sample
  std::vector<uint64_t> plus(static_cast<size_t>(M * words_for(1)));
  for (size_t i = 0; i < plus.size(); i += words_for(1)) plus[i] = 1;
  TorchRuntime rt;
  cpu::sign_product(rt.get(), {.a = d.const_data_ptr(),
                               .a_transposed = true,
                               .signs = plus.data(),
                               .signs_by_row = true,
                               .y = sum.mutable_data_ptr(),
                               .R = N,
                               .I = M,
                               .V = 1});
  return sum;
}

// Gradients of the sums, which is d itself and not given for a scale of 1, of the bias, of the input where there is a
// mask and of the weight where there is the input, packed or in numbers.
std::tuple<Tensor, Tensor, Tensor, Tensor> layer_grad(const Tensor& d, double scale, bool needs_bias, int64_t k,
                                                      std::optional<Tensor> w_bits, std::optional<Tensor> mask_bits,
                                                      std::optional<Tensor> x, std::optional<Tensor> gate_bits) {
  const Place place = place_of("d", d);
  check_matrix("d", d, place);
  require(d.scalar_type() == ScalarType::Float, "d: expected float32, got ", describe(d));
  const Tensor in = as_contiguous(d);
  Tensor own;
  if (scale != 1.0) {
    own = new_tensor({d.size(0), d.size(1)}, ScalarType::Float, place);
    const auto factor = static_cast<float>(scale);
    TorchRuntime rt;
    cpu::scale_values(rt.get(), {.whole = nullptr,
                                 .real = float_data(in),
                                 .factors = &factor,
                                 .factor_count = 1,
                                 .scale = nullptr,
                                 .shift = nullptr,
                                 .M = d.size(0),
                                 .N = d.size(1),
                                 .y = data<float>(own)});
  }
  const Tensor& sums = scale == 1.0 ? in : own;
  const auto weight_grad = [&] {
    if (!x) return Tensor();
    return x->scalar_type() == ScalarType::Long ? gated_weight_grad(sums, *x, k, gate_bits)
                                                : real_weight_grad(sums, *x);
  };
  return {own, needs_bias ? sum_over_samples(in) : Tensor(),
          mask_bits ? masked_input_grad(sums, *w_bits, k, *mask_bits) : Tensor(), weight_grad()};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(engram_kernels, CPU, m) {
  m.impl("_layer", TORCH_BOX(&layer));
  m.impl("_layer_grad", TORCH_BOX(&layer_grad));
}

}  // namespace engram::bindings
