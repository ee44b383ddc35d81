// Packing, unpacking and transposing bits.
#include "bindings/bits.h"

#include <torch/csrc/stable/library.h>

#include "bindings/cuda_call.h"
#include "bindings/tensors.h"
#include "core/bits.h"

namespace engram::bindings {

Tensor pack_window(const Tensor& x, double width, std::optional<Tensor> gate_bits) {
  const Place place = place_of("x", x);
  check_matrix("x", x, place);
  check_units("x", x);
  const int64_t rows = x.size(0), k = x.size(1);
  require(width > 0, "width: expected above 0, got ", width);
  const int64_t stride = gate_bits ? check_gate("gate_bits", *gate_bits, rows, k, place) : 0;
  const Tensor in = as_float32(x);
  const OptionalBits gate(gate_bits);
  Tensor bits = new_tensor({rows, words_for(k)}, ScalarType::Long, place);
  const PackWindow p{float_data(in), static_cast<float>(width), gate.data(), stride, rows, k,
                     words_for(k),   data<uint64_t>(bits)};
  if (place.cuda) {
    CudaCall(place).launch(cuda::launch_pack_window, p);
  } else {
    TorchRuntime rt;
    cpu::pack_window(rt.get(), p);
  }
  return bits;
}

Tensor pack_signs(const Tensor& x) {
  const Place place = place_of("x", x);
  check_floats("x", x, place);
  check_units("x", x);
  const Tensor in = as_contiguous(x);
  const int64_t k = in.size(in.dim() - 1);
  Tensor bits = new_tensor(with_last(in, words_for(k)), ScalarType::Long, place);
  PackSigns p{in.const_data_ptr(), element_of(in.scalar_type()), rows_of(in), k,
              words_for(k),        data<uint64_t>(bits),         nullptr};
  if (place.cuda) {
    CudaCall call(place);
    p.nan = call.nan_flag(cuda::kPackSigns);
    call.launch(cuda::launch_pack_signs, p);
  } else {
    TorchRuntime rt;
    require(!cpu::pack_signs(rt.get(), p), "x: expected numbers, got NaN, which has no sign");
  }
  return bits;
}

namespace {

Tensor unpack_signs(const Tensor& bits, int64_t k, ScalarType dtype) {
  check_k(k);
  const Place place = place_of("bits", bits);
  require(bits.scalar_type() == ScalarType::Long && bits.dim() >= 1 && bits.size(bits.dim() - 1) == words_for(k),
          "bits: expected int64 of shape (..., ", words_for(k), ") for k = ", k, ", got ", describe(bits));
  struct Pattern {
    int size;
    uint64_t plus, minus;
  } pattern{};
  switch (dtype) {
    case ScalarType::Float:
      pattern = {4, 0x3F800000u, 0xBF800000u};
      break;
    case ScalarType::BFloat16:
      pattern = {2, 0x3F80u, 0xBF80u};
      break;
    case ScalarType::Half:
      pattern = {2, 0x3C00u, 0xBC00u};
      break;
    case ScalarType::Double:
      pattern = {8, 0x3FF0000000000000u, 0xBFF0000000000000u};
      break;
    case ScalarType::Char:
      pattern = {1, 1, 0xFFu};
      break;
    case ScalarType::Int:
      pattern = {4, 1, 0xFFFFFFFFu};
      break;
    default:
      require(false, "dtype: expected float32, bfloat16, float16, float64, int8 or int32, got ", dtype_name(dtype));
  }
  const Tensor in = as_packed(bits);
  Tensor out = new_tensor(with_last(in, k), dtype, place);
  const UnpackSigns p{packed_data(in), rows_of(in),           k, words_for(k), pattern.size, pattern.plus,
                      pattern.minus,   out.mutable_data_ptr()};
  if (place.cuda) {
    CudaCall(place).launch(cuda::launch_unpack_signs, p);
  } else {
    TorchRuntime rt;
    cpu::unpack_signs(rt.get(), p);
  }
  return out;
}

// Counting codes needs it, which is done on the CPU alone.
Tensor transpose_bits(const Tensor& bits, int64_t k) {
  check_k(k);
  const Place place = place_of("bits", bits);
  check_packed("bits", bits, k, place);
  const int64_t rows = bits.size(0);
  const Tensor in = as_packed(bits);
  Tensor out = new_tensor({k, words_for(rows)}, ScalarType::Long, place);
  TorchRuntime rt;
  cpu::transpose_bits(rt.get(), {packed_data(in), rows, k, data<uint64_t>(out)});
  return out;
}

template <typename Library>
void implement(Library& m) {
  m.impl("pack_signs", TORCH_BOX(&pack_signs));
  m.impl("pack_window", TORCH_BOX(&pack_window));
  m.impl("unpack_signs", TORCH_BOX(&unpack_signs));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(engram_kernels, CPU, m) {
  implement(m);
  m.impl("transpose_bits", TORCH_BOX(&transpose_bits));
}
STABLE_TORCH_LIBRARY_IMPL(engram_kernels, CUDA, m) { implement(m); }

}  // namespace engram::bindings
