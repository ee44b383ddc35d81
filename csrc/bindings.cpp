// Every operator of engram_kernels: its schema, its checks, its way to the backend. LibTorch Stable ABI only, so that
// one library serves every Python >= 3.10 and torch >= 2.13. Errors name the argument, what it needs and what it got.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "core/bits.h"
#include "core/compact.h"
#include "core/window.h"
#include "cpu/launch.h"
#include "cuda/kernels.h"

// No operator that runs often takes a string: torch 2.13 leaks each one on its way through the Stable ABI.
STABLE_TORCH_LIBRARY(engram_kernels, m) {
  m.def("pack_signs(Tensor x) -> Tensor");
  m.def("pack_window(Tensor x, float width=1.0, Tensor? gate_bits=None) -> Tensor");
  m.def("unpack_signs(Tensor bits, int k, ScalarType dtype) -> Tensor");
  m.def("transpose_bits(Tensor bits, int k) -> Tensor");
  m.def("binary_matmul(Tensor x_bits, Tensor w_bits, int k, Tensor? gate_bits=None) -> Tensor");
  m.def("sign_matmul(Tensor a, Tensor w_bits, int k) -> Tensor");
  m.def("sign_matmul_t(Tensor x, Tensor w_bits, int k) -> Tensor");
  m.def("gated_input_grad(Tensor d, Tensor w_bits, Tensor x, Tensor? gate_bits=None) -> Tensor");
  m.def("masked_input_grad(Tensor d, Tensor w_bits, int k, Tensor mask_bits) -> Tensor");
  m.def("gated_weight_grad(Tensor d, Tensor x_bits, int k, Tensor? gate_bits=None) -> Tensor");
  m.def(
      "sample_engram(Tensor score, Tensor seed, float rate, bool bernoulli=False, float temperature=1.0, "
      "int first_row=0) -> Tensor");
// 1e39 is infinity in float32: a schema cannot say inf.
#define ENGRAM_UPDATE_ARGUMENTS                                                                           \
  "Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? sign_bits, *, float lr, float beta1, "          \
  "float beta2, float eps, float weight_decay, float metaplasticity, int step, float weight_bound=1e39, " \
  "Tensor(e!)? exp_avg_scale=None, Tensor(f!)? exp_avg_sq_scale=None, Tensor? seed=None, int first_row=0) -> ()"
  m.def("metaplastic_adam_(Tensor(a!) weight, Tensor grad, " ENGRAM_UPDATE_ARGUMENTS);
  m.def(
      "gated_metaplastic_adam_(Tensor d, Tensor x_bits, Tensor? gate_bits, Tensor(a!) "
      "weight, " ENGRAM_UPDATE_ARGUMENTS);
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
  m.def(
      "_check_update(Tensor weight, Tensor? grad, Tensor exp_avg, Tensor exp_avg_sq, Tensor? sign_bits, *, float lr, "
      "float beta1, float beta2, float eps, float weight_decay, float metaplasticity, int step, "
      "float weight_bound=1e39, Tensor? exp_avg_scale=None, Tensor? exp_avg_sq_scale=None, Tensor? seed=None, "
      "int first_row=0) -> float");
  m.def("_has_cuda() -> bool");
  m.def("_cuda_error(int device) -> str");
  m.def("_check_nan_flags() -> ()");
  m.def("_update_nan_flag() -> int");
  m.def("_isa() -> str");
  m.def("_available_isas() -> str");
  m.def("_set_isa(str name) -> ()");
}

namespace {

using engram::words_for;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- checks

template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

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

// A tensor's dtype and shape for a message; formatted only if the message is needed.
struct Description {
  const Tensor& t;
};
Description describe(const Tensor& t) { return {t}; }
std::ostream& operator<<(std::ostream& text, const Description& description) {
  const Tensor& t = description.t;
  text << dtype_name(t.scalar_type()) << " (";
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  return text << (t.dim() == 1 ? ",)" : ")");
}

// Where the first tensor argument lies, and all others have to.
struct Place {
  bool cuda, cpu;
  int32_t index;
};
// None arrives as an undefined tensor.
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

// Products are int32, so K must fit one.
void check_k(int64_t k) { require(k >= 1 && k <= INT32_MAX, "k: expected 1 to 2^31 - 1, got ", k); }

// The same of a size that comes with a tensor.
void check_units(const char* name, const Tensor& t) {
  const int64_t units = t.dim() == 0 ? 0 : t.size(t.dim() - 1);
  require(units >= 1 && units <= INT32_MAX, name, ": expected 1 to 2^31 - 1 units in the last dimension, got ",
          describe(t));
}

// Packed rows of k units, two-dimensional.
void check_packed(const char* name, const Tensor& t, int64_t k, const Place& place) {
  check_place(name, t, place);
  require(t.scalar_type() == ScalarType::Long && t.dim() == 2 && t.size(1) == words_for(k), name,
          ": expected int64 of shape (rows, ", words_for(k), ") for k = ", k, ", got ", describe(t));
}

// Returns the stride of the gate in words: 0 where one gate serves all samples.
int64_t check_gate(const char* name, const Tensor& t, int64_t samples, int64_t k, const Place& place) {
  check_place(name, t, place);
  const int64_t words = words_for(k);
  const bool shared = t.dim() == 1 && t.size(0) == words;
  const bool per_sample = t.dim() == 2 && t.size(0) == samples && t.size(1) == words;
  require(t.scalar_type() == ScalarType::Long && (shared || per_sample), name, ": expected int64 of shape (", words,
          ",) or (", samples, ", ", words, ") for k = ", k, ", got ", describe(t));
  return shared ? 0 : words;
}

bool aligned(const Tensor& t, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % bytes == 0; }

// Contiguous, and aligned to its own dtype, which a view of bytes or of a mapped file need not be.
Tensor as_contiguous(const Tensor& t) {
  const Tensor contiguous = t.is_contiguous() ? t : torch::stable::contiguous(t);
  return aligned(contiguous, static_cast<uintptr_t>(t.element_size())) ? contiguous : torch::stable::clone(contiguous);
}

struct Seed {
  uint64_t key;
  uint32_t offset;
};

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

// ---- services

template <typename T>
T* data(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}
const uint64_t* packed_data(const Tensor& t) { return static_cast<const uint64_t*>(t.const_data_ptr()); }
const float* float_data(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

engram::cpu::Element element_of(ScalarType dtype) {
  return dtype == ScalarType::Float      ? engram::cpu::Element::kFloat32
         : dtype == ScalarType::BFloat16 ? engram::cpu::Element::kBFloat16
                                         : engram::cpu::Element::kFloat16;
}

engram::cuda::Element cuda_element(ScalarType dtype) {
  return dtype == ScalarType::Float      ? engram::cuda::Element::kFloat32
         : dtype == ScalarType::BFloat16 ? engram::cuda::Element::kBFloat16
         : dtype == ScalarType::Half     ? engram::cuda::Element::kFloat16
                                         : engram::cuda::Element::kUint8;
}

// Contiguous, and on CUDA 16-byte aligned, which a view into other words need not be.
Tensor as_packed(const Tensor& t) {
  const Tensor packed = as_contiguous(t);
  return !t.is_cuda() || aligned(packed, 16) ? packed : torch::stable::clone(packed);
}

// Packed rows that may be missing.
class OptionalBits {
 public:
  explicit OptionalBits(const std::optional<Tensor>& t) : t_(t ? std::optional<Tensor>(as_packed(*t)) : std::nullopt) {}
  const Tensor* tensor() const { return t_ ? &*t_ : nullptr; }
  const uint64_t* data() const { return t_ ? packed_data(*t_) : nullptr; }

 private:
  std::optional<Tensor> t_;
};

Tensor as_float32(const Tensor& t) {
  return as_contiguous(t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float));
}

Tensor as_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

// Asks for huge pages in fresh memory that is about to be written: faulting in small ones takes several times as long
// as writing them. Only a hint.
void advise_huge_pages(Tensor& t) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
  const auto begin = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
  const uintptr_t bytes = static_cast<uintptr_t>(t.numel() * t.element_size());
  const uintptr_t first = (begin + kHugePage - 1) & ~(kHugePage - 1), last = (begin + bytes) & ~(kHugePage - 1);
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Uninitialised. By the C shim, since torch::stable::new_empty takes microseconds.
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
  if (!place.cuda) advise_huge_pages(t);
  return t;
}
Tensor new_tensor(std::initializer_list<int64_t> shape, ScalarType dtype, const Place& place) {
  return new_tensor(shape.begin(), static_cast<int64_t>(shape.size()), dtype, place);
}
Tensor new_tensor(const std::vector<int64_t>& shape, ScalarType dtype, const Place& place) {
  return new_tensor(shape.data(), static_cast<int64_t>(shape.size()), dtype, place);
}

// Threads and memory of torch, for the kernels.
class TorchRuntime {
 public:
  engram::cpu::Runtime get() {
    return {[](int64_t count, int64_t grain, engram::cpu::Runtime::Body body, void* context) {
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

 private:
  std::vector<Tensor> workspace_;
};

// CUDA kernels run later than the call that queues them, so that a NaN shows in a later one, as CUDA's own errors do.
void check_nan_flags(volatile int32_t* flags) {
  static const char* const kMessages[] = {
      "x: expected numbers, got NaN, which has no sign (in an earlier pack_signs on CUDA)",
      "score: expected numbers, got NaN (in an earlier sample_engram on CUDA)",
      "grad: expected finite steps, got NaN or infinity; those weights were left as they were (in an earlier "
      "metaplastic_adam_ on CUDA)"};
  for (int source = 0; source < engram::cuda::kNaNSources; ++source) {
    if (flags[source] == 0) continue;
    flags[source] = 0;
    require(false, kMessages[source]);
  }
}

// A call of CUDA kernels: makes the device current while it lives, and names the stream.
class CudaCall {
 public:
  explicit CudaCall(const Place& place) {
    require_success(engram::cuda::use_device(place.index, &previous_));
    entered_ = true;
    stream_ = torch::stable::accelerator::getCurrentStream(place.index).nativeHandle();
    require_success(engram::cuda::nan_flags(&flags_));
    check_nan_flags(flags_);
  }
  ~CudaCall() {
    if (entered_) engram::cuda::leave_device(previous_);
  }
  CudaCall(const CudaCall&) = delete;
  CudaCall& operator=(const CudaCall&) = delete;

  template <typename Arguments>
  void launch(int (*launcher)(const Arguments&, void*), const Arguments& arguments) {
    require_success(launcher(arguments, stream_));
  }
  int32_t* nan_flag(engram::cuda::NaNSource source) { return flags_ + source; }
  void refuse_capture(const char* message) {
    bool capturing = false;
    require_success(engram::cuda::is_capturing(stream_, &capturing));
    require(!capturing, message);
  }
  static void require_success(int error) { require(error == 0, "CUDA: ", engram::cuda::error_text(error)); }

 private:
  int previous_ = 0;
  bool entered_ = false;
  void* stream_ = nullptr;
  int32_t* flags_ = nullptr;
};

int64_t rows_of(const Tensor& t) { return t.size(t.dim() - 1) == 0 ? 0 : t.numel() / t.size(t.dim() - 1); }

std::vector<int64_t> with_last(const Tensor& t, int64_t last) {
  std::vector<int64_t> shape(t.sizes().begin(), t.sizes().end());
  shape.back() = last;
  return shape;
}

// ---- operators

Tensor pack_signs(const Tensor& x) {
  const Place place = place_of("x", x);
  check_floats("x", x, place);
  check_units("x", x);
  const Tensor in = as_contiguous(x);
  const int64_t k = in.size(in.dim() - 1);
  Tensor bits = new_tensor(with_last(in, words_for(k)), ScalarType::Long, place);
  if (place.cuda) {
    CudaCall call(place);
    call.launch(engram::cuda::launch_pack_signs,
                {in.const_data_ptr(), cuda_element(in.scalar_type()), rows_of(in), k, words_for(k),
                 data<uint64_t>(bits), call.nan_flag(engram::cuda::kPackSigns)});
    return bits;
  }
  TorchRuntime rt;
  const bool nan = engram::cpu::pack_signs(rt.get(), in.const_data_ptr(), element_of(in.scalar_type()), rows_of(in), k,
                                           static_cast<uint64_t*>(bits.mutable_data_ptr()));
  require(!nan, "x: expected numbers, got NaN, which has no sign");
  return bits;
}

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
  if (place.cuda) {
    CudaCall call(place);
    call.launch(engram::cuda::launch_pack_window, {float_data(in), static_cast<float>(width), gate.data(), stride, rows,
                                                   k, words_for(k), data<uint64_t>(bits)});
    return bits;
  }
  TorchRuntime rt;
  engram::cpu::pack_window(rt.get(), float_data(in), static_cast<float>(width), rows, k, gate.data(), stride,
                           static_cast<uint64_t*>(bits.mutable_data_ptr()));
  return bits;
}

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
  if (place.cuda) {
    CudaCall call(place);
    call.launch(engram::cuda::launch_unpack_signs, {packed_data(in), rows_of(in), k, words_for(k), pattern.size,
                                                    pattern.plus, pattern.minus, out.mutable_data_ptr()});
    return out;
  }
  TorchRuntime rt;
  engram::cpu::unpack_signs(rt.get(), packed_data(in), rows_of(in), k, pattern.size, pattern.plus, pattern.minus,
                            out.mutable_data_ptr());
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
  engram::cpu::transpose_bits(rt.get(), packed_data(in), rows, k, data<uint64_t>(out));
  return out;
}

// A product with signs on CUDA: numbers as they are, float16 as float32; y in their dtype, int32 for uint8.
Tensor cuda_product(const Place& place, const Tensor& numbers, std::initializer_list<int64_t> shape,
                    engram::cuda::SignProduct p) {
  const ScalarType dtype = numbers.scalar_type();
  const Tensor in = dtype == ScalarType::Half ? as_float32(numbers) : as_contiguous(numbers);
  Tensor y = new_tensor(shape, dtype == ScalarType::Byte ? ScalarType::Int : in.scalar_type(), place);
  p.a = in.const_data_ptr(), p.element = cuda_element(in.scalar_type()), p.y = y.mutable_data_ptr();
  CudaCall call(place);
  call.launch(engram::cuda::launch_sign_product, p);
  return dtype == ScalarType::Half ? as_dtype(y, dtype) : y;
}

// A product of bits on CUDA. Where rows have padding, a gate keeps it out.
void cuda_binary_matmul(const Place& place, engram::cuda::BinaryMatmul p) {
  CudaCall call(place);
  std::optional<Tensor> gate;
  if (p.K % engram::kRowBits != 0) {
    const int64_t rows = p.gate_stride == 0 ? 1 : p.M;
    gate = new_tensor({rows, p.words}, ScalarType::Long, place);
    call.launch(engram::cuda::launch_valid_gate, {p.gate, rows, p.K, p.words, data<uint64_t>(*gate)});
    p.gate = data<uint64_t>(*gate);
  }
  call.launch(engram::cuda::launch_binary_matmul, p);
}

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
  if (place.cuda) {
    cuda_binary_matmul(place, {packed_data(x), packed_data(w), gate.data(), stride, M, N, k, words_for(k),
                               data<int32_t>(y), nullptr, nullptr, nullptr});
    return y;
  }
  TorchRuntime rt;
  engram::cpu::binary_matmul(rt.get(), {packed_data(x), packed_data(w), gate.data(), stride, nullptr, data<int32_t>(y),
                                        M, N, k, words_for(k)});
  return y;
}

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
  if (place.cuda) {
    cuda_binary_matmul(place, {packed_data(x), packed_data(w), gate.data(), stride, M, N, k, words_for(k), nullptr,
                               threshold_data, flip_data, data<uint64_t>(bits)});
    return bits;
  }
  TorchRuntime rt;
  engram::cpu::binary_threshold(
      rt.get(), {packed_data(x), packed_data(w), gate.data(), stride, nullptr, nullptr, M, N, k, words_for(k)},
      threshold_data, flip_data, data<uint64_t>(bits));
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
  if (place.cuda)
    return cuda_product(place, a, {M, k}, {.signs = packed_data(w), .signs_by_row = true, .R = M, .I = N, .V = k});
  const Tensor in = as_float32(a);
  Tensor y = new_tensor({M, k}, ScalarType::Float, place);
  TorchRuntime rt;
  engram::cpu::sign_matmul(rt.get(), float_data(in), packed_data(w), data<float>(y), M, N, k);
  return as_dtype(y, a.scalar_type());
}

Tensor sign_matmul_t(const Tensor& x, const Tensor& w_bits, int64_t k) {
  check_k(k);
  const Place place = place_of("x", x);
  const bool exact = x.scalar_type() == ScalarType::Byte;
  if (!exact) check_matrix("x", x, place);
  check_packed("w_bits", w_bits, k, place);
  require(x.dim() == 2 && x.size(1) == k, "x: expected shape (M, ", k, ") for k = ", k, ", got ", describe(x));
  require(!exact || k <= INT32_MAX / 255, "k: expected at most ", INT32_MAX / 255, " for uint8, got ", k);
  const int64_t M = x.size(0), N = w_bits.size(0);
  const Tensor w = as_packed(w_bits);
  if (place.cuda) return cuda_product(place, x, {M, N}, {.signs = packed_data(w), .R = M, .I = k, .V = N});
  const Tensor in = exact ? as_contiguous(x) : as_float32(x);
  Tensor y = new_tensor({M, N}, exact ? ScalarType::Int : ScalarType::Float, place);
  TorchRuntime rt;
  engram::cpu::sign_matmul_t(rt.get(), in.const_data_ptr(), exact, packed_data(w), y.mutable_data_ptr(), M, N, k);
  return exact ? y : as_dtype(y, x.scalar_type());
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
  if (place.cuda)
    return cuda_product(place, d, {M, k},
                        {.signs = packed_data(w),
                         .signs_by_row = true,
                         .mask = packed_data(mask),
                         .mask_stride = stride,
                         .R = M,
                         .I = N,
                         .V = k});
  const Tensor in = as_float32(d);
  Tensor dx = new_tensor({M, k}, ScalarType::Float, place);
  TorchRuntime rt;
  engram::cpu::masked_input_grad(rt.get(), float_data(in), packed_data(w), packed_data(mask), stride, data<float>(dx),
                                 M, N, k);
  return as_dtype(dx, d.scalar_type());
}

Tensor gated_input_grad(const Tensor& d, const Tensor& w_bits, const Tensor& x, std::optional<Tensor> gate_bits) {
  const Place place = place_of("d", d);
  check_matrix("d", d, place);
  check_matrix("x", x, place);
  require(x.size(0) == d.size(0), "x: expected ", d.size(0), " samples like d, got ", describe(x));
  return masked_input_grad(d, w_bits, x.size(1), pack_window(x, 1.0, gate_bits));
}

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
  if (place.cuda)
    return cuda_product(place, d, {N, k},
                        {.a_transposed = true,
                         .signs = packed_data(x),
                         .signs_by_row = true,
                         .gate = gate.data(),
                         .gate_stride = stride,
                         .R = N,
                         .I = M,
                         .V = k});
  const Tensor in = as_float32(d);
  Tensor dw = new_tensor({N, k}, ScalarType::Float, place);
  TorchRuntime rt;
  engram::cpu::gated_weight_grad(rt.get(), {float_data(in), packed_data(x), gate.data(), stride, M, N, k},
                                 data<float>(dw));
  return as_dtype(dw, d.scalar_type());
}

// ---- convolutions

using engram::Window;

// A window as reference.Window gives it.
Window check_window(const std::vector<int64_t>& numbers, int64_t least_dilation = 1) {
  struct Field {
    const char* name;
    int64_t Window::* number;
    int64_t least;
  };
  static constexpr Field kFields[] = {
      {"height", &Window::height, 1},         {"width", &Window::width, 1},
      {"channels", &Window::channels, 1},     {"kernel_h", &Window::kernel_h, 1},
      {"kernel_w", &Window::kernel_w, 1},     {"stride_h", &Window::stride_h, 1},
      {"stride_w", &Window::stride_w, 1},     {"top", &Window::top, 0},
      {"bottom", &Window::bottom, 0},         {"left", &Window::left, 0},
      {"right", &Window::right, 0},           {"dilation_h", &Window::dilation_h, 0},
      {"dilation_w", &Window::dilation_w, 0}, {"groups", &Window::groups, 1},
  };
  require(numbers.size() == std::size(kFields), "window: expected ", std::size(kFields), " numbers, got ",
          numbers.size());
  Window w{};
  for (size_t i = 0; i < numbers.size(); ++i) {
    const bool dilates = kFields[i].number == &Window::dilation_h || kFields[i].number == &Window::dilation_w;
    const int64_t least = dilates ? least_dilation : kFields[i].least;
    require(numbers[i] >= least && numbers[i] <= INT32_MAX, "window: expected ", least, " to 2^31 - 1 as ",
            kFields[i].name, ", got ", numbers[i]);
    w.*kFields[i].number = numbers[i];
  }
  require(w.channels % w.groups == 0, "window: expected a number of groups that divides ", w.channels,
          " channels, got ", w.groups);
  const auto require_units = [](const char* what, int64_t a, int64_t b, int64_t c) {
    int64_t product = 0;
    require(!__builtin_mul_overflow(a, b, &product) && !__builtin_mul_overflow(product, c, &product) &&
                product <= INT32_MAX,
            "window: expected at most 2^31 - 1 ", what, ", got ", a, " x ", b, " x ", c);
  };
  require_units("units of a sample", w.height, w.width, w.channels);
  require_units("units of a kernel", w.kernel_h, w.kernel_w, w.channels / w.groups);
  const auto require_fit = [](const char* axis, int64_t size, int64_t padding, int64_t dilation, int64_t kernel) {
    require(size + padding > dilation * (kernel - 1), "window: expected a kernel that fits into the padded ", axis, " ",
            size + padding, ", got one of ", dilation * (kernel - 1) + 1);
  };
  require_fit("height", w.height, w.top + w.bottom, w.dilation_h, w.kernel_h);
  require_fit("width", w.width, w.left + w.right, w.dilation_w, w.kernel_w);
  require_units("output pixels of a sample", out_height(w), out_width(w), 1);
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

Tensor unfold_bits(const Tensor& bits, std::vector<int64_t> window, int64_t group) {
  const Place place = place_of("bits", bits);
  const Window w = check_window(window, 0);
  check_packed("bits", bits, units(w), place);
  require(group >= 0 && group < w.groups, "group: expected 0 to ", w.groups - 1, ", got ", group);
  const int64_t words = words_for(group_units(w));
  const Tensor in = as_packed(bits);
  Tensor rows = new_tensor({bits.size(0) * out_pixels(w), words}, ScalarType::Long, place);
  if (place.cuda) {
    CudaCall call(place);
    call.launch(engram::cuda::launch_unfold_bits,
                {packed_data(in), bits.size(0), w, group, data<uint64_t>(rows), words});
    return rows;
  }
  TorchRuntime rt;
  engram::cpu::unfold_bits(rt.get(), w, packed_data(in), bits.size(0), group, data<uint64_t>(rows));
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
  engram::cpu::interleave_bits(rt.get(), packed_data(in), out.size(0), rows, k, data<uint64_t>(out));
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
  engram::cpu::binary_conv2d(rt.get(), w,
                             {packed_data(x), packed_data(filters), gate.data(), stride, data<float>(y), samples,
                              outputs, static_cast<float>(scale)});
  return y;
}

Tensor masked_conv2d_input_grad(const Tensor& d, const Tensor& w_bits, std::vector<int64_t> window,
                                const Tensor& mask_bits, double scale) {
  const Place place = place_of("d", d);
  const Window w = check_window(window);
  check_filters(w_bits, w, place);
  check_output_grad(d, w, w_bits.size(0), place);
  const int64_t stride = check_gate("mask_bits", mask_bits, d.size(0), units(w), place);
  const Tensor in = as_float32(d), filters = as_packed(w_bits), mask = as_packed(mask_bits);
  Tensor dx = new_tensor({d.size(0), w.height, w.width, w.channels}, ScalarType::Float, place);
  TorchRuntime rt;
  engram::cpu::masked_conv2d_input_grad(rt.get(), w, float_data(in), packed_data(filters), packed_data(mask), stride,
                                        static_cast<float>(scale), data<float>(dx), d.size(0), w_bits.size(0));
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
  const Tensor in = as_float32(d), x = as_packed(x_bits);
  const OptionalBits gate(gate_bits);
  Tensor dw = new_tensor({outputs, group_units(w)}, ScalarType::Float, place);
  TorchRuntime rt;
  engram::cpu::gated_conv2d_weight_grad(rt.get(), w, float_data(in), packed_data(x), gate.data(), stride,
                                        static_cast<float>(scale), data<float>(dw), samples, outputs);
  return as_dtype(dw, d.scalar_type());
}

Tensor sample_engram(const Tensor& score, const Tensor& seed, double rate, bool bernoulli, double temperature,
                     int64_t first_row) {
  const Place place = place_of("score", score);
  check_matrix("score", score, place);
  check_units("score", score);
  const int64_t M = score.size(0), K = score.size(1);
  const Seed key = check_seed(seed);
  require(rate > 0 && rate <= 1, "rate: expected in (0, 1], got ", rate);
  require(temperature == 0 || temperature >= 1e-6, "temperature: expected 0 or at least 1e-6, got ", temperature);
  require(first_row >= 0, "first_row: expected at least 0, got ", first_row);
  const Tensor in = as_float32(score);
  Tensor gate = new_tensor({M, words_for(K)}, ScalarType::Long, place);
  const auto fill = [&](auto& p) {  // what the arguments of both backends have in common
    p.score = float_data(in);
    p.gate = data<uint64_t>(gate);
    p.M = M;
    p.K = K;
    p.words = words_for(K);
    p.bernoulli = bernoulli;
    const auto count = static_cast<int64_t>(std::nearbyint(rate * static_cast<double>(K)));
    p.count = count < 1 ? 1 : count;
    p.threshold = static_cast<uint64_t>(std::nearbyint(rate * 4294967296.0));
    p.inverse_temperature = temperature == 0 ? -1.0f : 1.0f / static_cast<float>(temperature);
    p.seed = key.key;
    p.offset = key.offset;
    p.first_row = static_cast<uint64_t>(first_row);
  };
  if (place.cuda) {
    CudaCall call(place);
    engram::cuda::SampleEngram p{};
    fill(p);
    if (bernoulli || temperature > 0)
      call.refuse_capture(
          "seed: expected no capture into a CUDA graph, which would replay one engram for ever, since the seed is read "
          "when the call is made; an engram without noise (temperature 0) can be captured");
    p.key_stride = engram::ceil_div(K, 4) * 4;
    std::optional<Tensor> keys;
    if (!bernoulli) keys = new_tensor({M, p.key_stride}, ScalarType::Int, place);
    p.keys = keys ? data<uint32_t>(*keys) : nullptr;
    p.nan = call.nan_flag(engram::cuda::kSampleEngram);
    call.launch(engram::cuda::launch_sample_engram, p);
    return gate;
  }
  engram::cpu::SampleEngram p{};
  fill(p);
  TorchRuntime rt;
  require(!engram::cpu::sample_engram(rt.get(), p), "score: expected numbers, got NaN");
  return gate;
}

struct Named {
  const char* name;
  const Tensor* tensor;  // null: not given
};
const Tensor* address(const std::optional<Tensor>& t) { return t ? &*t : nullptr; }

// Whatever is written shares memory with nothing else. Tensors are contiguous.
void check_apart(std::initializer_list<Named> written, std::initializer_list<Named> read) {
  const auto share_memory = [](const Tensor& one, const Tensor& other) {
    const auto begin = [](const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()); };
    const auto bytes = [](const Tensor& t) { return static_cast<uintptr_t>(t.numel() * t.element_size()); };
    return begin(one) < begin(other) + bytes(other) && begin(other) < begin(one) + bytes(one);
  };
  const auto check = [&](const Named& one, const Named& other) {
    require(one.tensor == nullptr || other.tensor == nullptr || !share_memory(*one.tensor, *other.tensor), one.name,
            ": expected memory of its own, got some that ", other.name, " shares");
  };
  for (const Named& one : written) {
    for (const Named* other = written.begin(); other != &one; ++other) check(one, *other);
    for (const Named& other : read) check(other, one);
  }
}

// What lies above consolidates every weight but 0 alike, and infinity times a weight of 0 would be a NaN.
constexpr double kMostMetaplasticity = 1e38;

// The arguments that both updates share, checked, all but the gradient; tensors on any device, if it is the weight's.
// `read` are contiguous tensors that the update reads.
engram::cpu::MetaplasticAdam check_update(Tensor& weight, Tensor& exp_avg, Tensor& exp_avg_sq,
                                          std::optional<Tensor>& sign_bits, double lr, double beta1, double beta2,
                                          double eps, double weight_decay, double metaplasticity, int64_t step,
                                          double weight_bound, std::optional<Tensor>& exp_avg_scale,
                                          std::optional<Tensor>& exp_avg_sq_scale, const std::optional<Tensor>& seed,
                                          int64_t first_row, std::initializer_list<Named> read) {
  const Place place = place_of("weight", weight);
  check_place("exp_avg", exp_avg, place);
  const ScalarType weight_dtype = weight.scalar_type(), state_dtype = exp_avg.scalar_type();
  require(weight_dtype == ScalarType::Float || weight_dtype == ScalarType::BFloat16,
          "weight: expected float32 or bfloat16, got ", describe(weight));
  require(weight.dim() == 2, "weight: expected 2 dimensions, got ", describe(weight));
  check_units("weight", weight);
  const int64_t N = weight.size(0), K = weight.size(1);
  const auto check = [&](const char* name, const Tensor& t, ScalarType dtype, int64_t rows, int64_t columns) {
    check_place(name, t, place);
    require(t.scalar_type() == dtype && t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name, ": expected ",
            dtype_name(dtype), " (", rows, ", ", columns, "), got ", describe(t));
    require(
        t.is_contiguous() && aligned(t, static_cast<uintptr_t>(t.element_size())), name,
        ": expected contiguous memory that is aligned to its dtype, to update it in place, got a view of other data");
  };
  check("weight", weight, weight_dtype, N, K);
  require(state_dtype == ScalarType::Float || state_dtype == ScalarType::BFloat16 || state_dtype == ScalarType::Char,
          "exp_avg: expected float32, bfloat16 or int8, got ", describe(exp_avg));
  const bool scaled = state_dtype == ScalarType::Char;
  check("exp_avg", exp_avg, state_dtype, N, K);
  check("exp_avg_sq", exp_avg_sq, scaled ? ScalarType::Byte : state_dtype, N, K);
  require(scaled == exp_avg_scale.has_value(), "exp_avg_scale: expected ", scaled ? "a tensor" : "None", " for ",
          dtype_name(state_dtype), " moments");
  require(scaled == exp_avg_sq_scale.has_value(), "exp_avg_sq_scale: expected ", scaled ? "a tensor" : "None", " for ",
          dtype_name(state_dtype), " moments");
  if (scaled) {
    const int64_t blocks = engram::ceil_div(K, engram::kScaleBlock);
    check("exp_avg_scale", *exp_avg_scale, ScalarType::Float, N, blocks);
    check("exp_avg_sq_scale", *exp_avg_sq_scale, ScalarType::Float, N, blocks);
  }
  const bool rounds = weight_dtype != ScalarType::Float || state_dtype != ScalarType::Float;
  require(!rounds || seed.has_value(), "seed: expected int64 (2,) to round compact numbers with, got None");
  const Seed key = seed ? check_seed(*seed) : Seed{};
  require(first_row >= 0, "first_row: expected at least 0, got ", first_row);
  if (sign_bits) check("sign_bits", *sign_bits, ScalarType::Long, N, words_for(K));
  require(lr >= 0 && std::isfinite(lr), "lr: expected a finite number of at least 0, got ", lr);
  require(beta1 >= 0 && beta1 < 1, "beta1: expected in [0, 1), got ", beta1);
  require(beta2 >= 0 && beta2 < 1, "beta2: expected in [0, 1), got ", beta2);
  require(eps >= 0, "eps: expected at least 0, got ", eps);
  require(weight_decay >= 0 && std::isfinite(weight_decay),
          "weight_decay: expected a finite number of at least 0, got ", weight_decay);
  require(metaplasticity >= 0, "metaplasticity: expected at least 0, got ", metaplasticity);
  const auto float_bound = static_cast<float>(weight_bound);
  require(float_bound > 0, "weight_bound: expected above 0 in float32, got ", weight_bound);
  require(step >= 1, "step: expected at least 1, got ", step);
  check_apart({{"weight", &weight},
               {"exp_avg", &exp_avg},
               {"exp_avg_sq", &exp_avg_sq},
               {"sign_bits", address(sign_bits)},
               {"exp_avg_scale", address(exp_avg_scale)},
               {"exp_avg_sq_scale", address(exp_avg_sq_scale)}},
              read);
  const double t = static_cast<double>(step);
  const double step_size = lr * std::sqrt(1 - std::pow(beta2, t)) / (1 - std::pow(beta1, t));
  engram::cpu::MetaplasticAdam p{};
  p.weight = weight.mutable_data_ptr();
  p.weight_element = element_of(weight_dtype);
  p.exp_avg = exp_avg.mutable_data_ptr();
  p.exp_avg_sq = exp_avg_sq.mutable_data_ptr();
  p.moments = scaled                             ? engram::cpu::Moments::kScaled
              : state_dtype == ScalarType::Float ? engram::cpu::Moments::kFloat32
                                                 : engram::cpu::Moments::kBFloat16;
  p.exp_avg_scale = scaled ? static_cast<float*>(exp_avg_scale->mutable_data_ptr()) : nullptr;
  p.exp_avg_sq_scale = scaled ? static_cast<float*>(exp_avg_sq_scale->mutable_data_ptr()) : nullptr;
  p.sign_bits = sign_bits ? static_cast<uint64_t*>(sign_bits->mutable_data_ptr()) : nullptr;
  p.N = N, p.K = K, p.words = words_for(K);
  p.beta1 = static_cast<float>(beta1), p.one_minus_beta1 = static_cast<float>(1 - beta1);
  p.beta2 = static_cast<float>(beta2), p.one_minus_beta2 = static_cast<float>(1 - beta2);
  p.eps = static_cast<float>(eps), p.weight_decay = static_cast<float>(weight_decay);
  p.metaplasticity = static_cast<float>(metaplasticity < kMostMetaplasticity ? metaplasticity : kMostMetaplasticity);
  p.step_size = static_cast<float>(step_size);
  p.weight_bound = float_bound;
  p.seed = key.key, p.offset = key.offset, p.first_row = static_cast<uint64_t>(first_row);
  return p;
}

void check_grad(const Tensor& grad, const Tensor& weight) {
  check_place("grad", grad, place_of("weight", weight));
  require((grad.scalar_type() == ScalarType::Float || grad.scalar_type() == weight.scalar_type()) && grad.dim() == 2 &&
              grad.size(0) == weight.size(0) && grad.size(1) == weight.size(1),
          "grad: expected float32 or the weight's dtype, in the weight's shape ", describe(weight), ", got ",
          describe(grad));
}

// For updates outside this library: checks as metaplastic_adam_ does. Returns the step size of this step.
double check_update_of(Tensor weight, std::optional<Tensor> grad, Tensor exp_avg, Tensor exp_avg_sq,
                       std::optional<Tensor> sign_bits, double lr, double beta1, double beta2, double eps,
                       double weight_decay, double metaplasticity, int64_t step, double weight_bound,
                       std::optional<Tensor> exp_avg_scale, std::optional<Tensor> exp_avg_sq_scale,
                       std::optional<Tensor> seed, int64_t first_row) {
  const engram::cpu::MetaplasticAdam p =
      check_update(weight, exp_avg, exp_avg_sq, sign_bits, lr, beta1, beta2, eps, weight_decay, metaplasticity, step,
                   weight_bound, exp_avg_scale, exp_avg_sq_scale, seed, first_row, {{"grad", address(grad)}});
  if (grad) check_grad(*grad, weight);
  return p.step_size;
}

constexpr const char* kNotFinite =
    "grad: expected finite steps, got NaN or infinity; those weights were left as they were";

void metaplastic_adam_(Tensor weight, const Tensor& grad, Tensor exp_avg, Tensor exp_avg_sq,
                       std::optional<Tensor> sign_bits, double lr, double beta1, double beta2, double eps,
                       double weight_decay, double metaplasticity, int64_t step, double weight_bound,
                       std::optional<Tensor> exp_avg_scale, std::optional<Tensor> exp_avg_sq_scale,
                       std::optional<Tensor> seed, int64_t first_row) {
  check_place("grad", grad, place_of("weight", weight));
  const Tensor g = as_contiguous(grad);
  engram::cpu::MetaplasticAdam p =
      check_update(weight, exp_avg, exp_avg_sq, sign_bits, lr, beta1, beta2, eps, weight_decay, metaplasticity, step,
                   weight_bound, exp_avg_scale, exp_avg_sq_scale, seed, first_row, {{"grad", &g}});
  check_grad(g, weight);
  p.grad = g.const_data_ptr();
  p.grad_element = element_of(g.scalar_type());
  p.grad_stride = p.K;
  TorchRuntime rt;
  require(!engram::cpu::metaplastic_adam(rt.get(), p), kNotFinite);
}

void gated_metaplastic_adam_(const Tensor& d, const Tensor& x_bits, std::optional<Tensor> gate_bits, Tensor weight,
                             Tensor exp_avg, Tensor exp_avg_sq, std::optional<Tensor> sign_bits, double lr,
                             double beta1, double beta2, double eps, double weight_decay, double metaplasticity,
                             int64_t step, double weight_bound, std::optional<Tensor> exp_avg_scale,
                             std::optional<Tensor> exp_avg_sq_scale, std::optional<Tensor> seed, int64_t first_row) {
  const Place place = place_of("weight", weight);
  check_matrix("d", d, place);
  require(weight.dim() == 2, "weight: expected 2 dimensions, got ", describe(weight));
  check_units("weight", weight);
  const int64_t M = d.size(0), N = d.size(1), K = weight.size(1);
  check_packed("x_bits", x_bits, K, place);
  const int64_t stride = gate_bits ? check_gate("gate_bits", *gate_bits, M, K, place) : 0;
  const Tensor in = as_float32(d), x = as_packed(x_bits);
  const OptionalBits gate(gate_bits);
  const engram::cpu::MetaplasticAdam p = check_update(
      weight, exp_avg, exp_avg_sq, sign_bits, lr, beta1, beta2, eps, weight_decay, metaplasticity, step, weight_bound,
      exp_avg_scale, exp_avg_sq_scale, seed, first_row, {{"d", &in}, {"x_bits", &x}, {"gate_bits", gate.tensor()}});
  require(N == p.N, "d: expected shape (M, ", p.N, ") to meet the rows of the weight, got ", describe(d));
  require(x_bits.size(0) == M, "x_bits: expected ", M, " samples like d, got ", describe(x_bits));
  TorchRuntime rt;
  const bool failed = engram::cpu::gated_metaplastic_adam(
      rt.get(), {float_data(in), packed_data(x), gate.data(), stride, M, p.N, p.K}, p);
  require(!failed, kNotFinite);
}

// ---- what was built and what runs

bool has_cuda() { return engram::cuda::built(); }

// Why CUDA kernels cannot run on a device, or nothing.
std::string cuda_error(int64_t device) {
  int previous = 0;
  const int error = engram::cuda::use_device(static_cast<int>(device), &previous);
  if (error != 0) return engram::cuda::error_text(error);
  engram::cuda::leave_device(previous);
  return "";
}

int32_t* nan_flags() {
  int32_t* flags = nullptr;
  CudaCall::require_success(engram::cuda::nan_flags(&flags));
  return flags;
}

void check_all_nan_flags() { check_nan_flags(nan_flags()); }

// Address that the update on CUDA, which is not in this library, writes 1 to if a weight could not be updated. Raises
// what has been reported so far.
int64_t update_nan_flag() {
  int32_t* flags = nan_flags();
  check_nan_flags(flags);
  return reinterpret_cast<int64_t>(flags + engram::cuda::kMetaplasticAdam);
}

std::string isa() { return engram::cpu::isa(); }

std::string available_isas() {
  std::string names;
  for (const std::string& name : engram::cpu::available_isas()) names += (names.empty() ? "" : ",") + name;
  return names;
}

void set_isa(std::string name) {
  require(engram::cpu::set_isa(name), "ISA: expected one of ", available_isas(), " on this machine, got '", name, "'");
}

}  // namespace

// The same functions for both devices. On CUDA the metaplastic updates are engram_kernels/triton_kernels, and the
// products of convolutions are made of unfold_bits and the products of matrices (engram_kernels/unfolding.py).
#define ENGRAM_OPERATORS(m)                                   \
  m.impl("pack_signs", TORCH_BOX(&pack_signs));               \
  m.impl("pack_window", TORCH_BOX(&pack_window));             \
  m.impl("unpack_signs", TORCH_BOX(&unpack_signs));           \
  m.impl("binary_matmul", TORCH_BOX(&binary_matmul));         \
  m.impl("binary_threshold", TORCH_BOX(&binary_threshold));   \
  m.impl("sign_matmul", TORCH_BOX(&sign_matmul));             \
  m.impl("sign_matmul_t", TORCH_BOX(&sign_matmul_t));         \
  m.impl("gated_input_grad", TORCH_BOX(&gated_input_grad));   \
  m.impl("masked_input_grad", TORCH_BOX(&masked_input_grad)); \
  m.impl("gated_weight_grad", TORCH_BOX(&gated_weight_grad)); \
  m.impl("unfold_bits", TORCH_BOX(&unfold_bits));             \
  m.impl("sample_engram", TORCH_BOX(&sample_engram))

STABLE_TORCH_LIBRARY_IMPL(engram_kernels, CPU, m) {
  ENGRAM_OPERATORS(m);
  m.impl("transpose_bits", TORCH_BOX(&transpose_bits));
  m.impl("interleave_bits", TORCH_BOX(&interleave_bits));
  m.impl("binary_conv2d", TORCH_BOX(&binary_conv2d));
  m.impl("masked_conv2d_input_grad", TORCH_BOX(&masked_conv2d_input_grad));
  m.impl("gated_conv2d_weight_grad", TORCH_BOX(&gated_conv2d_weight_grad));
  m.impl("metaplastic_adam_", TORCH_BOX(&metaplastic_adam_));
  m.impl("gated_metaplastic_adam_", TORCH_BOX(&gated_metaplastic_adam_));
}

STABLE_TORCH_LIBRARY_IMPL(engram_kernels, CUDA, m) { ENGRAM_OPERATORS(m); }

STABLE_TORCH_LIBRARY_IMPL(engram_kernels, CompositeExplicitAutograd, m) {
  m.impl("_check_update", TORCH_BOX(&check_update_of));
  m.impl("_has_cuda", TORCH_BOX(&has_cuda));
  m.impl("_cuda_error", TORCH_BOX(&cuda_error));
  m.impl("_check_nan_flags", TORCH_BOX(&check_all_nan_flags));
  m.impl("_update_nan_flag", TORCH_BOX(&update_nan_flag));
  m.impl("_isa", TORCH_BOX(&isa));
  m.impl("_available_isas", TORCH_BOX(&available_isas));
  m.impl("_set_isa", TORCH_BOX(&set_isa));
}
