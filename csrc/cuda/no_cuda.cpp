// Stands in for cuda/launch.cu in a build without nvcc: every launcher says so.
#include "cuda/kernels.h"

namespace engram::cuda {

namespace {
constexpr int kNoCuda = -1;
}

bool built() { return false; }
#define ENGRAM_NO_LAUNCHER(name, Arguments) \
  int launch_##name(const Arguments&, void*) { return kNoCuda; }
ENGRAM_CUDA_KERNELS(ENGRAM_NO_LAUNCHER)
int use_device(int, int*) { return kNoCuda; }
int leave_device(int) { return kNoCuda; }
int nan_flags(int32_t**) { return kNoCuda; }
int is_capturing(void*, bool*) { return kNoCuda; }
const char* error_text(int) {
  return "this build of engram_kernels has no CUDA kernels; build it where nvcc is found, or with ENGRAM_CUDA=1 to "
         "learn why it was not";
}

}  // namespace engram::cuda
