// The operators on bits that other operators call.
#pragma once

#include <optional>

#include "bindings/checks.h"

namespace engram::bindings {

Tensor pack_signs(const Tensor& x);
Tensor pack_window(const Tensor& x, double width, std::optional<Tensor> gate_bits);

}  // namespace engram::bindings
