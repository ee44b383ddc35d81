// Tensors as kernels take them, and the memory and threads that torch gives to kernels.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <vector>

#include "bindings/checks.h"
#include "core/operands.h"
#include "cpu/launch.h"

namespace engram::bindings {

template <typename T>
T* data(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}
inline const uint64_t* packed_data(const Tensor& t) { return static_cast<const uint64_t*>(t.const_data_ptr()); }
inline const float* float_data(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

// Of a dtype that kernels read.
Element element_of(ScalarType dtype);

int64_t rows_of(const Tensor& t);
// The shape of t with another size of the last dimension.
std::vector<int64_t> with_last(const Tensor& t, int64_t last);

bool aligned(const Tensor& t, uintptr_t bytes);
// Contiguous, and aligned to its own dtype, which a view of bytes or of a mapped file need not be.
Tensor as_contiguous(const Tensor& t);
// Contiguous, and on CUDA 16-byte aligned, which a view into other words need not be.
Tensor as_packed(const Tensor& t);
Tensor as_float32(const Tensor& t);
Tensor as_dtype(const Tensor& t, ScalarType dtype);
// A contiguous tensor of any shape as (1, elements), in the same memory; others as they are.
Tensor as_one_row(const Tensor& t);

// Packed rows that may be missing.
class OptionalBits {
 public:
  explicit OptionalBits(const std::optional<Tensor>& t) : t_(t ? std::optional<Tensor>(as_packed(*t)) : std::nullopt) {}
  const Tensor* tensor() const { return address(t_); }
  const uint64_t* data() const { return t_ ? packed_data(*t_) : nullptr; }

 private:
  std::optional<Tensor> t_;
};

// Uninitialised.
Tensor new_tensor(const int64_t* shape, int64_t dims, ScalarType dtype, const Place& place);
inline Tensor new_tensor(std::initializer_list<int64_t> shape, ScalarType dtype, const Place& place) {
  return new_tensor(shape.begin(), static_cast<int64_t>(shape.size()), dtype, place);
}
inline Tensor new_tensor(const std::vector<int64_t>& shape, ScalarType dtype, const Place& place) {
  return new_tensor(shape.data(), static_cast<int64_t>(shape.size()), dtype, place);
}

// Threads and memory of torch, for the CPU kernels of one call.
class TorchRuntime {
 public:
  cpu::Runtime get();

 private:
  std::vector<Tensor> workspace_;
};

}  // namespace engram::bindings
