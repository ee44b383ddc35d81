// What was built and what runs: instruction sets, CUDA, and NaNs that CUDA kernels have reported.
#include <torch/csrc/stable/library.h>

#include <string>

#include "bindings/cuda_call.h"
#include "cpu/launch.h"

namespace engram::bindings {

namespace {

bool has_cuda() { return cuda::built(); }

// Why CUDA kernels cannot run on a device, or nothing.
std::string cuda_error(int64_t device) {
  int previous = 0;
  const int error = cuda::use_device(static_cast<int>(device), &previous);
  if (error != 0) return cuda::error_text(error);
  cuda::leave_device(previous);
  return "";
}

int32_t* nan_flags() {
  int32_t* flags = nullptr;
  CudaCall::require_success(cuda::nan_flags(&flags));
  return flags;
}

void check_all_nan_flags() { check_nan_flags(nan_flags()); }

// Address that the update on CUDA, which is not in this library, writes 1 to if a weight could not be updated. Raises
// what has been reported so far.
int64_t update_nan_flag() {
  int32_t* flags = nan_flags();
  check_nan_flags(flags);
  return reinterpret_cast<int64_t>(flags + cuda::kMetaplasticAdam);
}

std::string isa() { return cpu::isa(); }

std::string available_isas() {
  std::string names;
  for (const std::string& name : cpu::available_isas()) names += (names.empty() ? "" : ",") + name;
  return names;
}

void set_isa(std::string name) {
  require(cpu::set_isa(name), "ISA: expected one of ", available_isas(), " on this machine, got '", name, "'");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(engram_kernels, CompositeExplicitAutograd, m) {
  m.impl("_has_cuda", TORCH_BOX(&has_cuda));
  m.impl("_cuda_error", TORCH_BOX(&cuda_error));
  m.impl("_check_nan_flags", TORCH_BOX(&check_all_nan_flags));
  m.impl("_update_nan_flag", TORCH_BOX(&update_nan_flag));
  m.impl("_isa", TORCH_BOX(&isa));
  m.impl("_available_isas", TORCH_BOX(&available_isas));
  m.impl("_set_isa", TORCH_BOX(&set_isa));
}

}  // namespace engram::bindings
