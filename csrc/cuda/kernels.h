// Launchers of the CUDA kernels, and what the bindings need of the CUDA runtime. Arguments are core/operands.h's.
// Launchers queue work on `stream` (a cudaStream_t) of the current device and return a cudaError_t, 0 for none; nothing
// here waits for the device.
#pragma once

#include <cstdint>

#include "core/operands.h"

namespace engram::cuda {

struct ValidGate {
  const uint64_t* gate;  // [rows, words], null: every unit
  int64_t rows, K, words;
  uint64_t* out;  // [rows, words]
};

// The kernels: name, arguments. Padding of x and w counts in binary_matmul, unless a gate leaves it out, and so does
// that of the gate.
#define ENGRAM_CUDA_KERNELS(KERNEL)   \
  KERNEL(pack_signs, PackSigns)       \
  KERNEL(pack_window, PackWindow)     \
  KERNEL(unpack_signs, UnpackSigns)   \
  KERNEL(valid_gate, ValidGate)       \
  KERNEL(unfold_bits, UnfoldBits)     \
  KERNEL(binary_matmul, BinaryMatmul) \
  KERNEL(sign_product, SignProduct)   \
  KERNEL(sample_engram, SampleEngram) \
  KERNEL(standardise, Standardise)    \
  KERNEL(standardise_grad, StandardiseGrad)

#define ENGRAM_DECLARE_LAUNCHER(name, Arguments) int launch_##name(const Arguments& p, void* stream);
ENGRAM_CUDA_KERNELS(ENGRAM_DECLARE_LAUNCHER)
#undef ENGRAM_DECLARE_LAUNCHER

bool built();  // with CUDA kernels
// Makes `device` current and tells which was before, for leave_device. An error if there is no driver or the device is
// older than the kernels.
int use_device(int device, int* previous);
int leave_device(int previous);
// Host memory in which kernels report NaNs, one flag for each NaNSource; allocated at the first call.
enum NaNSource { kPackSigns, kSampleEngram, kMetaplasticAdam, kNaNSources };
int nan_flags(int32_t** flags);
const char* error_text(int error);
// Whether work queued on the stream is recorded in a graph, which replays it with the arguments that it has now.
int is_capturing(void* stream, bool* capturing);

}  // namespace engram::cuda
