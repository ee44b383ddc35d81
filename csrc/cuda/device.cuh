// What a kernel file includes: CUDA under nvcc, the emulator (tests/emulator) under a C++ compiler. The same sources
// are compiled by both.
#pragma once

#include <cstdint>

#if defined(ENGRAM_EMULATED)
#include "emulated_cuda.h"
#define ENGRAM_ARCH ENGRAM_EMULATED
#else
#include <cuda_runtime.h>
#if defined(__CUDA_ARCH__)
#define ENGRAM_ARCH __CUDA_ARCH__
#else
#define ENGRAM_ARCH 800  // the host's pass over device code generates none
#endif
#define ENGRAM_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#endif

namespace engram::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

}  // namespace engram::cuda
