#include "bindings/checks.h"

#include "bindings/tensors.h"

namespace engram::bindings {

const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    default:
      return "an unsupported dtype";
  }
}

std::ostream& operator<<(std::ostream& text, const Description& description) {
  const Tensor& t = description.t;
  text << dtype_name(t.scalar_type()) << " (";
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  return text << (t.dim() == 1 ? ",)" : ")");
}

Place place_of(const char* name, const Tensor& t) {
  require(t.defined(), name, ": expected a tensor, got None");
  return {t.is_cuda(), t.is_cpu(), t.is_cuda() ? t.get_device_index() : 0};
}
std::ostream& operator<<(std::ostream& text, const Place& place) {
  if (place.cuda) return text << "cuda:" << place.index;
  return text << (place.cpu ? "cpu" : "another device");
}

void check_place(const char* name, const Tensor& t, const Place& place) {
  const Place own = place_of(name, t);
  require(own.cuda == place.cuda && own.cpu == place.cpu && own.index == place.index, name, ": expected a tensor on ",
          place, " like the other arguments, got one on ", own);
}

void check_floats(const char* name, const Tensor& t, const Place& place) {
  check_place(name, t, place);
  const ScalarType dtype = t.scalar_type();
  require(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, name,
          ": expected float32, bfloat16 or float16, got ", describe(t));
}

void check_matrix(const char* name, const Tensor& t, const Place& place) {
  check_floats(name, t, place);
  require(t.dim() == 2, name, ": expected 2 dimensions, got ", describe(t));
}

void check_k(int64_t k) { require(k >= 1 && k <= INT32_MAX, "k: expected 1 to 2^31 - 1, got ", k); }

void check_units(const char* name, const Tensor& t) {
  const int64_t units = t.dim() == 0 ? 0 : t.size(t.dim() - 1);
  require(units >= 1 && units <= INT32_MAX, name, ": expected 1 to 2^31 - 1 units in the last dimension, got ",
          describe(t));
}

void check_packed(const char* name, const Tensor& t, int64_t k, const Place& place) {
  check_place(name, t, place);
  require(t.scalar_type() == ScalarType::Long && t.dim() == 2 && t.size(1) == words_for(k), name,
          ": expected int64 of shape (rows, ", words_for(k), ") for k = ", k, ", got ", describe(t));
}

int64_t check_gate(const char* name, const Tensor& t, int64_t samples, int64_t k, const Place& place) {
  check_place(name, t, place);
  const int64_t words = words_for(k);
  const bool shared = t.dim() == 1 && t.size(0) == words;
  const bool per_sample = t.dim() == 2 && t.size(0) == samples && t.size(1) == words;
  require(t.scalar_type() == ScalarType::Long && (shared || per_sample), name, ": expected int64 of shape (", words,
          ",) or (", samples, ", ", words, ") for k = ", k, ", got ", describe(t));
  return shared ? 0 : words;
}

Seed check_seed(const Tensor& seed) {
  const Place place = place_of("seed", seed);
  require(place.cpu, "seed: expected a CPU tensor, got one on ", place);
  require(seed.scalar_type() == ScalarType::Long && seed.dim() == 1 && seed.size(0) == 2,
          "seed: expected int64 (2,), the Philox key and offset, got ", describe(seed));
  const Tensor contiguous = as_contiguous(seed);
  const auto* words = static_cast<const int64_t*>(contiguous.const_data_ptr());
  require(words[1] >= 0 && words[1] <= 0xFFFFFFFF, "seed: expected an offset in [0, 2^32), got ", words[1]);
  return {static_cast<uint64_t>(words[0]), static_cast<uint32_t>(words[1])};
}

void check_apart(std::initializer_list<Named> written, std::initializer_list<Named> read) {
  struct Memory {
    const char* name;
    uintptr_t begin, end;
  };
  constexpr size_t kMost = 16;  // tensors of a call
  Memory of[kMost];
  size_t count = 0, changed = 0;
  for (const auto& tensors : {written, read}) {
    for (const Named& t : tensors) {
      if (t.tensor == nullptr) continue;
      if (count == kMost) throw std::logic_error("an operator of too many tensors");
      const auto begin = reinterpret_cast<uintptr_t>(t.tensor->const_data_ptr());
      of[count++] = {t.name, begin, begin + static_cast<uintptr_t>(t.tensor->numel() * t.tensor->element_size())};
    }
    changed = changed == 0 ? count : changed;
  }
  for (size_t i = 1; i < count; ++i)
    for (size_t j = 0; j < (i < changed ? i : changed); ++j)
      require(!(of[i].begin < of[j].end && of[j].begin < of[i].end), of[i].name,
              ": expected memory of its own, got some that ", of[j].name, " shares");
}

}  // namespace engram::bindings
