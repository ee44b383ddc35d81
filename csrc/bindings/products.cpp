// Products of bits, and of real numbers with signs.
#include "bindings/products.h"

#include <torch/csrc/stable/library.h>

#include "bindings/bits.h"
#include "bindings/cuda_call.h"
#include "bindings/tensors.h"

namespace engram::bindings {

namespace {

// On CUDA, where rows have padding, a gate keeps it out.
void binary_product(const Place& place, BinaryMatmul p) {
  if (!place.cuda) {
    TorchRuntime rt;
    return cpu::binary_matmul(rt.get(), p);
  }
  CudaCall call(place);
  std::optional<Tensor> gate;
  if (p.K % kRowBits != 0) {
    const int64_t rows = p.gate_stride == 0 ? 1 : p.M;
    gate = new_tensor({rows, p.words}, ScalarType::Long, place);
    call.launch(cuda::launch_valid_gate, {p.gate, rows, p.K, p.words, data<uint64_t>(*gate)});
    p.gate = data<uint64_t>(*gate);
  }
  call.launch(cuda::launch_binary_matmul, p);
}

// `p` is all but the numbers and y, which comes in their dtype, int32 for uint8. Kernels take uint8 and float32, on
// CUDA bfloat16 too.
Tensor sign_product(const Place& place, const Tensor& numbers, std::initializer_list<int64_t> shape, SignProduct p) {
  const ScalarType dtype = numbers.scalar_type();
  const bool exact = dtype == ScalarType::Byte, as_they_are = exact || (place.cuda && dtype == ScalarType::BFloat16);
  const Tensor in = as_they_are ? as_contiguous(numbers) : as_float32(numbers);
  Tensor y = new_tensor(shape, exact ? ScalarType::Int : in.scalar_type(), place);
  p.a = in.const_data_ptr(), p.element = element_of(in.scalar_type()), p.y = y.mutable_data_ptr();
  if (place.cuda) {
    CudaCall(place).launch(cuda::launch_sign_product, p);
  } else {
    TorchRuntime rt;
    cpu::sign_product(rt.get(), p);
  }
  return exact ? y : as_dtype(y, dtype);
}

}  // namespace

Tensor binary_matmul(const Tensor& x_bits, const Tensor& w_bits, int64_t k, std::optional<Tensor> gate_bits) {
  check_k(k);
  const Place place = place_of("x_bits", x_bits);
  check_packed("x_bits", x_bits, k, place);
  check_packed("w_bits", w_bits, k, place);
  const int64_t M = x_bits.size(0), N = w_bits.size(0);
  const int64_t stride = gate_bits ? check_gate("gate_bits", *gate_bits, M, k, place) : 0;
  const Tensor x = as_packed(x_bits), w = as_packed(w_bits);
  const OptionalBits gate(gate_bits);
  Tensor y = new_tensor({M, N}, ScalarType::Int, place);
  binary_product(place, {packed_data(x), packed_data(w), gate.data(), stride, M, N, k, words_for(k), data<int32_t>(y),
                         nullptr, nullptr, nullptr});
  return y;
}

namespace {

Tensor binary_threshold(const Tensor& x_bits, const Tensor& w_bits, int64_t k, const Tensor& threshold,
                        const Tensor& flip, std::optional<Tensor> gate_bits) {
  check_k(k);
  const Place place = place_of("x_bits", x_bits);
  check_packed("x_bits", x_bits, k, place);
  check_packed("w_bits", w_bits, k, place);
  const int64_t M = x_bits.size(0), N = w_bits.size(0);
  require(N >= 1 && N <= INT32_MAX, "w_bits: expected 1 to 2^31 - 1 rows, got ", describe(w_bits));
  const auto check_by_row = [&](const char* name, const Tensor& t, ScalarType dtype) {
    check_place(name, t, place);
    require(t.scalar_type() == dtype && t.dim() == 1 && t.size(0) == N, name, ": expected ", dtype_name(dtype), " (", N,
            ",), one for each row of w_bits, got ", describe(t));
  };
  check_by_row("threshold", threshold, ScalarType::Int);
  check_by_row("flip", flip, ScalarType::Bool);
  const int64_t stride = gate_bits ? check_gate("gate_bits", *gate_bits, M, k, place) : 0;
  const Tensor x = as_packed(x_bits), w = as_packed(w_bits);
  const Tensor thresholds = as_contiguous(threshold), flips = as_contiguous(flip);
  const auto* threshold_data = static_cast<const int32_t*>(thresholds.const_data_ptr());
  const auto* flip_data = static_cast<const uint8_t*>(flips.const_data_ptr());
  const OptionalBits gate(gate_bits);
  Tensor bits = new_tensor({M, words_for(N)}, ScalarType::Long, place);
  binary_product(place, {packed_data(x), packed_data(w), gate.data(), stride, M, N, k, words_for(k), nullptr,
                         threshold_data, flip_data, data<uint64_t>(bits)});
  return bits;
}

Tensor sign_matmul(const Tensor& a, const Tensor& w_bits, int64_t k) {
  check_k(k);
  const Place place = place_of("a", a);
  check_matrix("a", a, place);
  check_packed("w_bits", w_bits, k, place);
  const int64_t M = a.size(0), N = w_bits.size(0);
  require(a.size(1) == N, "a: expected shape (M, ", N, ") to meet the ", N, " rows of w_bits, got ", describe(a));
  const Tensor w = as_packed(w_bits);
  return sign_product(place, a, {M, k}, {.signs = packed_data(w), .signs_by_row = true, .R = M, .I = N, .V = k});
}

}  // namespace

Tensor sign_matmul_t(const Tensor& x, const Tensor& w_bits, int64_t k, std::optional<Tensor> w_groups) {
  check_k(k);
  const Place place = place_of("x", x);
  const bool exact = x.scalar_type() == ScalarType::Byte;
  if (!exact) check_matrix("x", x, place);
  check_packed("w_bits", w_bits, k, place);
  require(x.dim() == 2 && x.size(1) == k, "x: expected shape (M, ", k, ") for k = ", k, ", got ", describe(x));
  require(!exact || k <= INT32_MAX / 255, "k: expected at most ", INT32_MAX / 255, " for uint8, got ", k);
  const int64_t M = x.size(0), N = w_bits.size(0);
  const int64_t groups = ceil_div(k, kGroup), stride = ceil_div(N, kGroupedRows) * kGroupedRows;
  if (w_groups) {
    check_place("w_groups", *w_groups, place);
    require(w_groups->scalar_type() == ScalarType::Short && w_groups->dim() == 2 && w_groups->size(0) == groups &&
                w_groups->size(1) == stride,
            "w_groups: expected int16 of shape (", groups, ", ", stride, ") for k = ", k, " and ", N, " rows, got ",
            describe(*w_groups));
  }
  const Tensor w = as_packed(w_bits);
  if (w_groups && exact && place.cpu) {
    const Tensor in = as_contiguous(x), grouped = as_contiguous(*w_groups);
    Tensor y = new_tensor({M, N}, ScalarType::Int, place);
    TorchRuntime rt;
    cpu::grouped_product(rt.get(),
                         {static_cast<const uint8_t*>(in.const_data_ptr()),
                          static_cast<const uint16_t*>(grouped.const_data_ptr()), stride, data<int32_t>(y), M, N, k},
                         packed_data(w));
    return y;
  }
  return sign_product(place, x, {M, N}, {.signs = packed_data(w), .R = M, .I = k, .V = N});
}

Tensor masked_input_grad(const Tensor& d, const Tensor& w_bits, int64_t k, const Tensor& mask_bits) {
  check_k(k);
  const Place place = place_of("d", d);
  check_matrix("d", d, place);
  check_packed("w_bits", w_bits, k, place);
  const int64_t M = d.size(0), N = w_bits.size(0);
  require(d.size(1) == N, "d: expected shape (M, ", N, ") to meet the ", N, " rows of w_bits, got ", describe(d));
  const int64_t stride = check_gate("mask_bits", mask_bits, M, k, place);
  const Tensor w = as_packed(w_bits), mask = as_packed(mask_bits);
  return sign_product(place, d, {M, k},
                      {.signs = packed_data(w),
                       .signs_by_row = true,
                       .mask = packed_data(mask),
                       .mask_stride = stride,
                       .R = M,
                       .I = N,
                       .V = k});
}

namespace {

Tensor gated_input_grad(const Tensor& d, const Tensor& w_bits, const Tensor& x, std::optional<Tensor> gate_bits) {
  const Place place = place_of("d", d);
  check_matrix("d", d, place);
  check_matrix("x", x, place);
  require(x.size(0) == d.size(0), "x: expected ", d.size(0), " samples like d, got ", describe(x));
  return masked_input_grad(d, w_bits, x.size(1), pack_window(x, 1.0, gate_bits));
}

}  // namespace

Tensor gated_weight_grad(const Tensor& d, const Tensor& x_bits, int64_t k, std::optional<Tensor> gate_bits) {
  check_k(k);
  const Place place = place_of("d", d);
  check_matrix("d", d, place);
  check_packed("x_bits", x_bits, k, place);
  const int64_t M = d.size(0), N = d.size(1);
  require(x_bits.size(0) == M, "x_bits: expected ", M, " samples like d, got ", describe(x_bits));
  const int64_t stride = gate_bits ? check_gate("gate_bits", *gate_bits, M, k, place) : 0;
  const Tensor x = as_packed(x_bits);
  const OptionalBits gate(gate_bits);
  return sign_product(place, d, {N, k},
                      {.a_transposed = true,
                       .signs = packed_data(x),
                       .signs_by_row = true,
                       .gate = gate.data(),
                       .gate_stride = stride,
                       .R = N,
                       .I = M,
                       .V = k});
}

Tensor real_weight_grad(const Tensor& d, const Tensor& x) {
  const Place place = place_of("d", d);
  check_matrix("d", d, place);
  check_matrix("x", x, place);
  check_units("x", x);
  const int64_t M = d.size(0), N = d.size(1), K = x.size(1);
  require(x.size(0) == M, "x: expected ", M, " samples like d, got ", describe(x));
  require(x.scalar_type() == d.scalar_type(), "x: expected ", dtype_name(d.scalar_type()), " like d, got ",
          describe(x));
  const Tensor outputs = as_float32(d), units = as_float32(x);
  Tensor dw = new_tensor({N, K}, ScalarType::Float, place);
  TorchRuntime rt;
  cpu::real_weight_grad(rt.get(), {float_data(outputs), N, float_data(units), M, K, data<float>(dw), K}, N);
  return as_dtype(dw, d.scalar_type());
}

namespace {

template <typename Library>
void implement(Library& m) {
  m.impl("binary_matmul", TORCH_BOX(&binary_matmul));
  m.impl("binary_threshold", TORCH_BOX(&binary_threshold));
  m.impl("sign_matmul", TORCH_BOX(&sign_matmul));
  m.impl("sign_matmul_t", TORCH_BOX(&sign_matmul_t));
  m.impl("gated_input_grad", TORCH_BOX(&gated_input_grad));
  m.impl("masked_input_grad", TORCH_BOX(&masked_input_grad));
  m.impl("gated_weight_grad", TORCH_BOX(&gated_weight_grad));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(engram_kernels, CPU, m) {
  implement(m);
  m.impl("real_weight_grad", TORCH_BOX(&real_weight_grad));
}
STABLE_TORCH_LIBRARY_IMPL(engram_kernels, CUDA, m) { implement(m); }

}  // namespace engram::bindings
