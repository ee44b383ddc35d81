// Calls of CUDA kernels, and the NaNs that they report later.
#pragma once

#include <cstdint>

#include "bindings/checks.h"
#include "cuda/kernels.h"

namespace engram::bindings {

// Throws if a flag of cuda::nan_flags is set, and clears it. CUDA kernels run later than the call that queues them, so
// that a NaN shows in a later one, as CUDA's own errors do.
void check_nan_flags(volatile int32_t* flags);

// Makes the device current while it lives, and names the stream.
class CudaCall {
 public:
  explicit CudaCall(const Place& place);
  ~CudaCall();
  CudaCall(const CudaCall&) = delete;
  CudaCall& operator=(const CudaCall&) = delete;

  template <typename Arguments>
  void launch(int (*launcher)(const Arguments&, void*), const Arguments& arguments) {
    require_success(launcher(arguments, stream_));
  }
  int32_t* nan_flag(cuda::NaNSource source) { return flags_ + source; }
  void refuse_capture(const char* message);
  static void require_success(int error) { require(error == 0, "CUDA: ", cuda::error_text(error)); }

 private:
  int previous_ = 0;
  bool entered_ = false;
  void* stream_ = nullptr;
  int32_t* flags_ = nullptr;
};

}  // namespace engram::bindings
