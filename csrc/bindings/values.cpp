// What a packed network makes of the integers of a product. On the CPU; on CUDA ops.py composes it of torch's
// operators.
#include <torch/csrc/stable/library.h>

#include "bindings/tensors.h"

namespace engram::bindings {

namespace {

const int32_t* integers(const Tensor& t) { return static_cast<const int32_t*>(t.const_data_ptr()); }

void check_values(const Tensor& y, const Place& place) {
  check_place("y", y, place);
  require(y.scalar_type() == ScalarType::Int && y.dim() == 2 && y.size(1) >= 1 && y.size(1) <= INT32_MAX,
          "y: expected int32 (M, N) of 1 to 2^31 - 1 units, got ", describe(y));
}

Tensor value_signs(const Tensor& y, std::optional<Tensor> threshold, std::optional<Tensor> flip) {
  const Place place = place_of("y", y);
  check_values(y, place);
  const int64_t M = y.size(0), N = y.size(1);
  const auto check_by_unit = [&](const char* name, const Tensor& t, ScalarType dtype) {
    check_place(name, t, place);
    require(t.scalar_type() == dtype && t.dim() == 1 && t.size(0) == N, name, ": expected ", dtype_name(dtype), " (", N,
            ",), one for each unit of y, got ", describe(t));
  };
  if (threshold) check_by_unit("threshold", *threshold, ScalarType::Int);
  if (flip) {
    require(threshold.has_value(), "flip: expected None without thresholds, got ", describe(*flip));
    check_by_unit("flip", *flip, ScalarType::Bool);
  }
  const Tensor in = as_contiguous(y);
  std::optional<Tensor> thresholds, flips;
  if (threshold) thresholds = as_contiguous(*threshold);
  if (flip) flips = as_contiguous(*flip);
  Tensor bits = new_tensor({M, words_for(N)}, ScalarType::Long, place);
  TorchRuntime rt;
  cpu::value_signs(
      rt.get(), {integers(in), thresholds ? integers(*thresholds) : nullptr,
                 flips ? static_cast<const uint8_t*>(flips->const_data_ptr()) : nullptr, M, N, data<uint64_t>(bits)});
  return bits;
}

Tensor top_units(const Tensor& y, int64_t count) {
  const Place place = place_of("y", y);
  check_values(y, place);
  const int64_t M = y.size(0), K = y.size(1);
  require(count >= 1 && count <= K, "count: expected 1 to ", K, ", the units of y, got ", count);
  const Tensor in = as_contiguous(y);
  Tensor gate = new_tensor({M, words_for(K)}, ScalarType::Long, place);
  TorchRuntime rt;
  cpu::top_units(rt.get(), {integers(in), M, K, count, data<uint64_t>(gate)});
  return gate;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(engram_kernels, CPU, m) {
  m.impl("value_signs", TORCH_BOX(&value_signs));
  m.impl("top_units", TORCH_BOX(&top_units));
}

}  // namespace engram::bindings
