// The products that other operators call.
#pragma once

#include <optional>

#include "bindings/checks.h"

namespace engram::bindings {

Tensor binary_matmul(const Tensor& x_bits, const Tensor& w_bits, int64_t k, std::optional<Tensor> gate_bits);
Tensor sign_matmul_t(const Tensor& x, const Tensor& w_bits, int64_t k, std::optional<Tensor> w_groups);
Tensor masked_input_grad(const Tensor& d, const Tensor& w_bits, int64_t k, const Tensor& mask_bits);
Tensor gated_weight_grad(const Tensor& d, const Tensor& x_bits, int64_t k, std::optional<Tensor> gate_bits);
Tensor real_weight_grad(const Tensor& d, const Tensor& x);

}  // namespace engram::bindings
