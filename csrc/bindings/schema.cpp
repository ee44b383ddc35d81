// Every operator of engram_kernels: its name, arguments and result. The other files of this folder implement them, for
// CPU and CUDA. LibTorch Stable ABI only, so that one library serves every Python >= 3.10 and torch >= 2.13.
#include <torch/csrc/stable/library.h>

#include "bindings/update.h"

// No operator that runs often takes a string: torch 2.13 leaks each one on its way through the Stable ABI.
STABLE_TORCH_LIBRARY(engram_kernels, m) {
  using engram::bindings::update_schema;
  m.def("pack_signs(Tensor x) -> Tensor");
  m.def("pack_window(Tensor x, float width=1.0, Tensor? gate_bits=None) -> Tensor");
  m.def("unpack_signs(Tensor bits, int k, ScalarType dtype) -> Tensor");
  m.def("transpose_bits(Tensor bits, int k) -> Tensor");
  m.def("binary_matmul(Tensor x_bits, Tensor w_bits, int k, Tensor? gate_bits=None) -> Tensor");
  m.def("sign_matmul(Tensor a, Tensor w_bits, int k) -> Tensor");
  m.def("sign_matmul_t(Tensor x, Tensor w_bits, int k, Tensor? w_groups=None) -> Tensor");
  m.def("gated_input_grad(Tensor d, Tensor w_bits, Tensor x, Tensor? gate_bits=None) -> Tensor");
  m.def("masked_input_grad(Tensor d, Tensor w_bits, int k, Tensor mask_bits) -> Tensor");
  m.def("gated_weight_grad(Tensor d, Tensor x_bits, int k, Tensor? gate_bits=None) -> Tensor");
  m.def("real_weight_grad(Tensor d, Tensor x) -> Tensor");
  m.def(
      "_layer(Tensor x, Tensor w_bits, Tensor? gate_bits, Tensor? bias, float scale, bool binary_input, float? window) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "_layer_grad(Tensor d, float scale, bool needs_bias, int k, Tensor? w_bits, Tensor? mask_bits, Tensor? x, "
      "Tensor? gate_bits) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("value_signs(Tensor y, Tensor? threshold=None, Tensor? flip=None) -> Tensor");
  m.def("standardise(Tensor y, float eps=1e-5) -> (Tensor, Tensor)");
  m.def("standardise_grad(Tensor d, Tensor y, Tensor moments) -> Tensor");
  m.def("top_units(Tensor y, int count) -> Tensor");
  m.def("packed_network(Tensor x, Tensor? gate_bits, int[] layout, float[] factors, Tensor[] tensors) -> Tensor");
  m.def("patch_excitability(Tensor images, Tensor filters, Tensor units, float floor, int pool=3) -> Tensor");
  m.def(
      "sample_engram(Tensor score, Tensor seed, float rate, bool bernoulli=False, float temperature=1.0, "
      "int first_row=0, int row_step=1) -> Tensor");
  m.def(update_schema("metaplastic_adam_(Tensor(a!) weight, Tensor grad", true, "()").c_str());
  m.def(
      update_schema("gated_metaplastic_adam_(Tensor d, Tensor x_bits, Tensor? gate_bits, Tensor(a!) weight", true, "()")
          .c_str());
  m.def(update_schema("real_metaplastic_adam_(Tensor d, Tensor x, Tensor(a!) weight", true, "()").c_str());
  m.def(
      "_update_all(Tensor(a!)[] weight, Tensor[] grad, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, Tensor(d!)[] "
      "sign_bits, Tensor(e!)[] step, float lr, float beta1, float beta2, float eps, float weight_decay, float "
      "metaplasticity, float weight_bound) -> int");
  m.def(
      "_update_from_layer(Tensor d, Tensor x, Tensor? gate_bits, Tensor(a!) weight, Tensor(b!) exp_avg, Tensor(c!) "
      "exp_avg_sq, Tensor(d!) sign_bits, Tensor(e!) step, float lr, float beta1, float beta2, float eps, float "
      "weight_decay, float metaplasticity, float weight_bound) -> ()");
  m.def(update_schema("_check_update(Tensor weight, Tensor? grad", false, "float[]").c_str());
  m.def(
      "binary_threshold(Tensor x_bits, Tensor w_bits, int k, Tensor threshold, Tensor flip, Tensor? gate_bits=None) "
      "-> Tensor");
  // window: the 14 numbers of core/window.h
  m.def("unfold_bits(Tensor bits, int[] window, int group=0) -> Tensor");
  m.def("interleave_bits(Tensor bits, int rows, int k) -> Tensor");
  m.def("binary_conv2d(Tensor x_bits, Tensor w_bits, int[] window, Tensor? gate_bits=None, float scale=1.0) -> Tensor");
  m.def("masked_conv2d_input_grad(Tensor d, Tensor w_bits, int[] window, Tensor mask_bits, float scale=1.0) -> Tensor");
  m.def(
      "gated_conv2d_weight_grad(Tensor d, Tensor x_bits, int[] window, Tensor? gate_bits=None, float scale=1.0) "
      "-> Tensor");
  m.def("_has_cuda() -> bool");
  m.def("_cuda_error(int device) -> str");
  m.def("_check_nan_flags() -> ()");
  m.def("_update_nan_flag() -> int");
  m.def("_isa() -> str");
  m.def("_available_isas() -> str");
  m.def("_set_isa(str name) -> ()");
}
