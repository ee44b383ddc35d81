// Standardising samples, and the gradient through it.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "bindings/cuda_call.h"
#include "bindings/tensors.h"

namespace engram::bindings {

namespace {

std::tuple<Tensor, Tensor> standardise(const Tensor& y, double eps) {
  const Place place = place_of("y", y);
  check_matrix("y", y, place);
  check_units("y", y);
  require(eps >= 0, "eps: expected at least 0, got ", eps);
  const int64_t M = y.size(0), N = y.size(1);
  const Tensor in = as_float32(y);
  Tensor z = new_tensor({M, N}, ScalarType::Float, place), moments = new_tensor({M, 2}, ScalarType::Double, place);
  const Standardise p{float_data(in), eps, M, N, data<float>(z), data<double>(moments)};
  if (place.cuda) {
    CudaCall(place).launch(cuda::launch_standardise, p);
  } else {
    TorchRuntime rt;
    cpu::standardise(rt.get(), p);
  }
  return {as_dtype(z, y.scalar_type()), moments};
}

Tensor standardise_grad(const Tensor& d, const Tensor& y, const Tensor& moments) {
  const Place place = place_of("d", d);
  check_matrix("d", d, place);
  check_matrix("y", y, place);
  check_units("y", y);
  const int64_t M = y.size(0), N = y.size(1);
  require(d.size(0) == M && d.size(1) == N, "d: expected the shape of y, ", describe(y), ", got ", describe(d));
  check_place("moments", moments, place);
  require(
      moments.scalar_type() == ScalarType::Double && moments.dim() == 2 && moments.size(0) == M && moments.size(1) == 2,
      "moments: expected float64 (", M, ", 2), mean and reciprocal deviation, got ", describe(moments));
  const Tensor gradient = as_float32(d), in = as_float32(y), own = as_contiguous(moments);
  Tensor dy = new_tensor({M, N}, ScalarType::Float, place);
  const StandardiseGrad p{float_data(gradient), float_data(in), static_cast<const double*>(own.const_data_ptr()), M, N,
                          data<float>(dy)};
  if (place.cuda) {
    CudaCall(place).launch(cuda::launch_standardise_grad, p);
  } else {
    TorchRuntime rt;
    cpu::standardise_grad(rt.get(), p);
  }
  return as_dtype(dy, y.scalar_type());
}

template <typename Library>
void implement(Library& m) {
  m.impl("standardise", TORCH_BOX(&standardise));
  m.impl("standardise_grad", TORCH_BOX(&standardise_grad));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(engram_kernels, CPU, m) { implement(m); }
STABLE_TORCH_LIBRARY_IMPL(engram_kernels, CUDA, m) { implement(m); }

}  // namespace engram::bindings
