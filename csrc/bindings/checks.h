// What every operator's arguments are checked with. A message names the argument, what it needs and what it got.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <ostream>
#include <sstream>
#include <stdexcept>

#include "core/bits.h"

namespace engram::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

const char* dtype_name(ScalarType dtype);

// A tensor's dtype and shape for a message; formatted only if the message is needed.
struct Description {
  const Tensor& t;
};
inline Description describe(const Tensor& t) { return {t}; }
std::ostream& operator<<(std::ostream& text, const Description& description);

// Where the first tensor argument lies, and all others have to.
struct Place {
  bool cuda, cpu;
  int32_t index;
};
// None arrives as an undefined tensor.
Place place_of(const char* name, const Tensor& t);
std::ostream& operator<<(std::ostream& text, const Place& place);

void check_place(const char* name, const Tensor& t, const Place& place);
void check_floats(const char* name, const Tensor& t, const Place& place);
void check_matrix(const char* name, const Tensor& t, const Place& place);
// Products are int32, so K must fit one.
void check_k(int64_t k);
// The same of a size that comes with a tensor.
void check_units(const char* name, const Tensor& t);
// Packed rows of k units, two-dimensional.
void check_packed(const char* name, const Tensor& t, int64_t k, const Place& place);
// Returns the stride of the gate in words: 0 where one gate serves all samples.
int64_t check_gate(const char* name, const Tensor& t, int64_t samples, int64_t k, const Place& place);

struct Seed {
  uint64_t key;
  uint32_t offset;
};
Seed check_seed(const Tensor& seed);

struct Named {
  const char* name;
  const Tensor* tensor;  // null: not given
};
inline const Tensor* address(const std::optional<Tensor>& t) { return t ? &*t : nullptr; }

// Whatever is written shares memory with nothing else. Tensors are contiguous.
void check_apart(std::initializer_list<Named> written, std::initializer_list<Named> read);

}  // namespace engram::bindings
