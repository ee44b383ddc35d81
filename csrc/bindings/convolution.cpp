// Convolutions of bits. On CUDA, products are made of unfold_bits and the products of matrices, by
// engram_kernels/unfolding.py.
#include <torch/csrc/stable/library.h>

#include <iterator>

#include "bindings/cuda_call.h"
#include "bindings/tensors.h"
#include "core/window_check.h"

namespace engram::bindings {

namespace {

// A window as reference.Window gives it.
Window check_window(const std::vector<int64_t>& numbers, int64_t least_dilation = 1) {
  require(numbers.size() == std::size(kWindowFields), "window: expected ", std::size(kWindowFields), " numbers, got ",
          numbers.size());
  Window w{};
  for (size_t i = 0; i < numbers.size(); ++i) w.*kWindowFields[i].number = numbers[i];
  const std::string fault = window_fault(w, least_dilation);
  require(fault.empty(), "window: ", fault);
  return w;
}

// Weights (O, K), whose rows the groups of the window share out evenly.
void check_filters(const Tensor& w_bits, const Window& w, const Place& place) {
  check_packed("w_bits", w_bits, group_units(w), place);
  require(w_bits.size(0) >= 1 && w_bits.size(0) % w.groups == 0, "w_bits: expected a row or more, which ", w.groups,
          " groups share out evenly, got ", describe(w_bits));
}

// Gradients (B, out_h, out_w, O) of the outputs.
void check_output_grad(const Tensor& d, const Window& w, int64_t outputs, const Place& place) {
  check_floats("d", d, place);
  require(d.dim() == 4 && d.size(1) == out_height(w) && d.size(2) == out_width(w) && d.size(3) == outputs,
          "d: expected shape (B, ", out_height(w), ", ", out_width(w), ", ", outputs, "), got ", describe(d));
}

// Float32 gradients of the outputs, whose pixels or whose outputs lie side by side; `outputs_first`: the pixels.
Tensor as_output_grad(const Tensor& d, bool& outputs_first) {
  const int64_t width = d.size(2), pixels = d.size(1) * width;
  outputs_first = d.scalar_type() == ScalarType::Float && !d.is_contiguous() && d.stride(2) == 1 &&
                  d.stride(1) == width && d.stride(3) == pixels && d.stride(0) == pixels * d.size(3);
  return outputs_first ? d : as_float32(d);
}

Tensor unfold_bits(const Tensor& bits, std::vector<int64_t> window, int64_t group) {
  const Place place = place_of("bits", bits);
  const Window w = check_window(window, 0);
  check_packed("bits", bits, units(w), place);
  require(group >= 0 && group < w.groups, "group: expected 0 to ", w.groups - 1, ", got ", group);
  const int64_t words = words_for(group_units(w)), samples = bits.size(0);
  const Tensor in = as_packed(bits);
  Tensor rows = new_tensor({samples * out_pixels(w), words}, ScalarType::Long, place);
  const UnfoldBits p{packed_data(in), samples, words_for(units(w)), w, group, data<uint64_t>(rows), words};
  if (place.cuda) {
    CudaCall(place).launch(cuda::launch_unfold_bits, p);
  } else {
    TorchRuntime rt;
    cpu::unfold_bits(rt.get(), p);
  }
  return rows;
}

// For images whose channels come first, on the CPU alone.
Tensor interleave_bits(const Tensor& bits, int64_t rows, int64_t k) {
  check_k(k);
  const Place place = place_of("bits", bits);
  check_packed("bits", bits, k, place);
  require(rows >= 1 && rows <= INT32_MAX / k, "rows: expected 1 to ", INT32_MAX / k, " for k = ", k, ", got ", rows);
  require(bits.size(0) % rows == 0, "bits: expected a multiple of ", rows, " rows, got ", describe(bits));
  const Tensor in = as_packed(bits);
  Tensor out = new_tensor({bits.size(0) / rows, words_for(rows * k)}, ScalarType::Long, place);
  TorchRuntime rt;
  cpu::interleave_bits(rt.get(), {packed_data(in), out.size(0), rows, k, data<uint64_t>(out)});
  return out;
}

Tensor binary_conv2d(const Tensor& x_bits, const Tensor& w_bits, std::vector<int64_t> window,
                     std::optional<Tensor> gate_bits, double scale) {
  const Place place = place_of("x_bits", x_bits);
  const Window w = check_window(window);
  check_packed("x_bits", x_bits, units(w), place);
  check_filters(w_bits, w, place);
  const int64_t samples = x_bits.size(0), outputs = w_bits.size(0);
  const int64_t stride = gate_bits ? check_gate("gate_bits", *gate_bits, samples, units(w), place) : 0;
  const Tensor x = as_packed(x_bits), filters = as_packed(w_bits);
  const OptionalBits gate(gate_bits);
  Tensor y = new_tensor({samples, out_height(w), out_width(w), outputs}, ScalarType::Float, place);
  TorchRuntime rt;
  cpu::binary_conv2d(rt.get(), {packed_data(x), packed_data(filters), gate.data(), stride, w, samples, outputs,
                                static_cast<float>(scale), data<float>(y), nullptr});
  return y;
}

Tensor masked_conv2d_input_grad(const Tensor& d, const Tensor& w_bits, std::vector<int64_t> window,
                                const Tensor& mask_bits, double scale) {
  const Place place = place_of("d", d);
  const Window w = check_window(window);
  check_filters(w_bits, w, place);
  check_output_grad(d, w, w_bits.size(0), place);
  const int64_t stride = check_gate("mask_bits", mask_bits, d.size(0), units(w), place);
  bool outputs_first = false;
  const Tensor in = as_output_grad(d, outputs_first), filters = as_packed(w_bits), mask = as_packed(mask_bits);
  Tensor dx = new_tensor({d.size(0), w.height, w.width, w.channels}, ScalarType::Float, place);
  TorchRuntime rt;
  cpu::masked_conv2d_input_grad(
      rt.get(), {float_data(in), outputs_first, packed_data(filters), packed_data(mask), stride, w, d.size(0),
                 w_bits.size(0), static_cast<float>(scale), data<float>(dx)});
  return as_dtype(dx, d.scalar_type());
}

Tensor gated_conv2d_weight_grad(const Tensor& d, const Tensor& x_bits, std::vector<int64_t> window,
                                std::optional<Tensor> gate_bits, double scale) {
  const Place place = place_of("d", d);
  const Window w = check_window(window);
  require(d.dim() == 4, "d: expected 4 dimensions, got ", describe(d));
  const int64_t samples = d.size(0), outputs = d.size(3);
  check_output_grad(d, w, outputs, place);
  require(outputs >= 1 && outputs % w.groups == 0, "d: expected an output or more, which ", w.groups,
          " groups share out evenly, got ", describe(d));
  check_packed("x_bits", x_bits, units(w), place);
  require(x_bits.size(0) == samples, "x_bits: expected ", samples, " samples like d, got ", describe(x_bits));
  const int64_t stride = gate_bits ? check_gate("gate_bits", *gate_bits, samples, units(w), place) : 0;
  bool outputs_first = false;
  const Tensor in = as_output_grad(d, outputs_first), x = as_packed(x_bits);
  const OptionalBits gate(gate_bits);
  Tensor dw = new_tensor({outputs, group_units(w)}, ScalarType::Float, place);
  TorchRuntime rt;
  cpu::gated_conv2d_weight_grad(rt.get(), {float_data(in), outputs_first, packed_data(x), gate.data(), stride, w,
                                           samples, outputs, static_cast<float>(scale), data<float>(dw)});
  return as_dtype(dw, d.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(engram_kernels, CPU, m) {
  m.impl("unfold_bits", TORCH_BOX(&unfold_bits));
  m.impl("interleave_bits", TORCH_BOX(&interleave_bits));
  m.impl("binary_conv2d", TORCH_BOX(&binary_conv2d));
  m.impl("masked_conv2d_input_grad", TORCH_BOX(&masked_conv2d_input_grad));
  m.impl("gated_conv2d_weight_grad", TORCH_BOX(&gated_conv2d_weight_grad));
}
STABLE_TORCH_LIBRARY_IMPL(engram_kernels, CUDA, m) { m.impl("unfold_bits", TORCH_BOX(&unfold_bits)); }

}  // namespace engram::bindings
