#include "bindings/tensors.h"

#include <torch/csrc/stable/ops.h>

#include "cpu/huge_pages.h"

namespace engram::bindings {

Element element_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return Element::kFloat32;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    case ScalarType::Half:
      return Element::kFloat16;
    case ScalarType::Byte:
      return Element::kUint8;
    default:
      throw std::logic_error("a dtype that no kernel reads");
  }
}

int64_t rows_of(const Tensor& t) { return t.size(t.dim() - 1) == 0 ? 0 : t.numel() / t.size(t.dim() - 1); }

std::vector<int64_t> with_last(const Tensor& t, int64_t last) {
  std::vector<int64_t> shape(t.sizes().begin(), t.sizes().end());
  shape.back() = last;
  return shape;
}

bool aligned(const Tensor& t, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % bytes == 0; }

Tensor as_contiguous(const Tensor& t) {
  const Tensor contiguous = t.is_contiguous() ? t : torch::stable::contiguous(t);
  return aligned(contiguous, static_cast<uintptr_t>(t.element_size())) ? contiguous : torch::stable::clone(contiguous);
}

Tensor as_packed(const Tensor& t) {
  const Tensor packed = as_contiguous(t);
  return !t.is_cuda() || aligned(packed, 16) ? packed : torch::stable::clone(packed);
}

Tensor as_float32(const Tensor& t) {
  return as_contiguous(t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float));
}

Tensor as_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

Tensor as_one_row(const Tensor& t) {
  if (!t.is_contiguous()) return t;
  const int64_t shape[] = {1, t.numel()}, strides[] = {t.numel(), 1};
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), 2, shape, strides, 0, &handle));
  return Tensor(handle);
}

// By the C shim, since torch::stable::new_empty takes microseconds.
Tensor new_tensor(const int64_t* shape, int64_t dims, ScalarType dtype, const Place& place) {
  constexpr int64_t kDims = 8;
  constexpr int64_t kMostElements = int64_t{1} << 59;  // whose bytes an int64 counts
  int64_t few_strides[kDims];
  std::vector<int64_t> many_strides;
  int64_t* strides = few_strides;
  if (dims > kDims) {
    many_strides.resize(static_cast<size_t>(dims));
    strides = many_strides.data();
  }
  int64_t elements = 1;
  for (int64_t i = dims - 1; i >= 0; --i) {
    strides[i] = elements;
    require(!__builtin_mul_overflow(elements, shape[i] > 0 ? shape[i] : 1, &elements) && elements <= kMostElements,
            "result: expected at most ", kMostElements, " elements, got ", shape[0], " rows of too many");
  }
  AtenTensorHandle handle;
  const auto shim_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  const int32_t device_type = place.cuda ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu();
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, shape, strides, shim_dtype, device_type, place.index, &handle));
  Tensor t(handle);
  if (!place.cuda) cpu::advise_huge_pages(t.mutable_data_ptr(), static_cast<size_t>(t.numel() * t.element_size()));
  return t;
}

cpu::Runtime TorchRuntime::get() {
  return {[](int64_t count, int64_t grain, cpu::Runtime::Body body, void* context) {
            torch::stable::parallel_for(0, count, grain,
                                        [&](int64_t begin, int64_t end) { body(begin, end, context); });
          },
          [](void* owner, size_t bytes) -> void* {
            auto* self = static_cast<TorchRuntime*>(owner);
            self->workspace_.push_back(new_tensor({static_cast<int64_t>(bytes)}, ScalarType::Byte, {}));
            return self->workspace_.back().mutable_data_ptr();
          },
          this, static_cast<int>(torch::stable::get_num_threads())};
}

}  // namespace engram::bindings
