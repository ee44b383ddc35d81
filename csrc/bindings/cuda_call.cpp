#include "bindings/cuda_call.h"

#include <torch/csrc/stable/accelerator.h>

namespace engram::bindings {

void check_nan_flags(volatile int32_t* flags) {
  static const char* const kMessages[] = {
      "x: expected numbers, got NaN, which has no sign (in an earlier pack_signs on CUDA)",
      "score: expected numbers, got NaN (in an earlier sample_engram on CUDA)",
      "grad: expected finite steps, got NaN or infinity; those weights were left as they were (in an earlier "
      "metaplastic_adam_ on CUDA)"};
  for (int source = 0; source < cuda::kNaNSources; ++source) {
    if (flags[source] == 0) continue;
    flags[source] = 0;
    require(false, kMessages[source]);
  }
}

CudaCall::CudaCall(const Place& place) {
  require_success(cuda::use_device(place.index, &previous_));
  entered_ = true;
  stream_ = torch::stable::accelerator::getCurrentStream(place.index).nativeHandle();
  require_success(cuda::nan_flags(&flags_));
  check_nan_flags(flags_);
}

CudaCall::~CudaCall() {
  if (entered_) cuda::leave_device(previous_);
}

void CudaCall::refuse_capture(const char* message) {
  bool capturing = false;
  require_success(cuda::is_capturing(stream_, &capturing));
  require(!capturing, message);
}

}  // namespace engram::bindings
