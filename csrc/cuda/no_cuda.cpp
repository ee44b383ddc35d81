// Stands in for cuda/launch.cu in a build without nvcc: every launcher says so.
#include "cuda/kernels.h"

namespace engram::cuda {

namespace {
constexpr int kNoCuda = -1;
}

bool built() { return false; }
int launch_pack_signs(const PackSigns&, void*) { return kNoCuda; }
int launch_pack_window(const PackWindow&, void*) { return kNoCuda; }
int launch_unpack_signs(const UnpackSigns&, void*) { return kNoCuda; }
int launch_valid_gate(const ValidGate&, void*) { return kNoCuda; }
int launch_binary_matmul(const BinaryMatmul&, void*) { return kNoCuda; }
int launch_sign_product(const SignProduct&, void*) { return kNoCuda; }
int launch_unfold_bits(const UnfoldBits&, void*) { return kNoCuda; }
int launch_sample_engram(const SampleEngram&, void*) { return kNoCuda; }
int use_device(int, int*) { return kNoCuda; }
int leave_device(int) { return kNoCuda; }
int nan_flags(int32_t**) { return kNoCuda; }
int is_capturing(void*, bool*) { return kNoCuda; }
const char* error_text(int) {
  return "this build of engram_kernels has no CUDA kernels; build it where nvcc is found, or with ENGRAM_CUDA=1 to "
         "learn why it was not";
}

}  // namespace engram::cuda
