// Launchers of all kernels, the only file that nvcc compiles.
#include <cstring>

#include "cuda/binary_dot.cuh"
#include "cuda/binary_matmul.cuh"
#include "cuda/pack.cuh"
#include "cuda/sample_engram.cuh"
#include "cuda/sign_product.cuh"
#include "cuda/standardise.cuh"
#include "cuda/unfold.cuh"
#include "cuda/unpack.cuh"
#include "cuda/valid_gate.cuh"

namespace engram::cuda {

namespace {

cudaStream_t as_stream(void* stream) { return static_cast<cudaStream_t>(stream); }

__global__ void probe_kernel() {}

}  // namespace

#define ENGRAM_DEFINE_LAUNCHER(name, Arguments) \
  int launch_##name(const Arguments& p, void* stream) { return name(p, as_stream(stream)); }
ENGRAM_CUDA_KERNELS(ENGRAM_DEFINE_LAUNCHER)

bool built() { return true; }

int use_device(int device, int* previous) {
  cudaError_t error = cudaGetDevice(previous);
  if (error == cudaSuccess && *previous != device) error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  cudaFuncAttributes attributes;  // tells whether this device has code for it
  error = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (error != cudaSuccess) leave_device(*previous);
  return error;
}

int leave_device(int previous) { return cudaSetDevice(previous); }

int is_capturing(void* stream, bool* capturing) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(as_stream(stream), &status);
  *capturing = status != cudaStreamCaptureStatusNone;
  return error;
}

int nan_flags(int32_t** flags) {
  static int32_t* allocated = nullptr;
  static const cudaError_t error = [] {
    const size_t bytes = kNaNSources * sizeof(int32_t);
    const cudaError_t failed = cudaHostAlloc(&allocated, bytes, cudaHostAllocPortable | cudaHostAllocMapped);
    if (failed == cudaSuccess) memset(allocated, 0, bytes);
    return failed;
  }();
  *flags = allocated;
  return error;
}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace engram::cuda
