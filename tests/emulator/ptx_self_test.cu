// Kernels from which nvcc makes what the PTX interpreter has to know: see test_ptx.py, which repeats them in Python.
#include <cstdint>

struct Arguments {
  const float* x;
  float* y;
  int64_t n;
  float scale, divisor;
};

__constant__ float weights[4] = {1.0f, -2.0f, 3.0f, -4.0f};
__device__ int offsets[3] = {5, 7, 11};

__device__ __noinline__ float weighted(float value, int i) { return value * weights[i % 4]; }

// A struct argument, tables, a function that is called, an array in local memory, a switch.
__global__ void __launch_bounds__(256) language(Arguments p) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= p.n) return;
  float value = weighted(__fadd_rn(__fmul_rn(p.x[i], p.scale), static_cast<float>(offsets[i % 3])), i);
  float history[8];
  for (int j = 0; j < 8; ++j) history[j] = value * static_cast<float>(j);
  value = history[i * 5 % 8];
  switch (i % 5) {
    case 0:
      value += 1.0f;
      break;
    case 1:
      value = -value;
      break;
    case 2:
      value = sqrtf(fabsf(value));
      break;
    case 3:
      value /= p.divisor;
      break;
    default:
      value = static_cast<float>(static_cast<int>(value));
  }
  p.y[i] = value;
}

// Shuffles, static and dynamic shared memory, barriers that reduce.
__global__ void reduction(const int32_t* x, int32_t* sums, int32_t* any, int32_t* count, int n) {
  extern __shared__ int32_t of_warps[];
  __shared__ int32_t total;
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const int32_t own = i < n ? x[i] : 0;
  int32_t sum = own;
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(0xFFFFFFFFu, sum, offset);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = sum;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  if (threadIdx.x < blockDim.x / 32) atomicAdd(&total, of_warps[threadIdx.x]);
  const int large = __syncthreads_or(own > 998), positive = __syncthreads_count(own > 0);
  if (threadIdx.x == 0) sums[blockIdx.x] = total, any[blockIdx.x] = large != 0, count[blockIdx.x] = positive;
}

__global__ void integers(const int64_t* a, const int64_t* b, int64_t* out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  const int64_t x = a[i], y = b[i];
  const auto ux = static_cast<uint64_t>(x);
  const int32_t low = static_cast<int32_t>(x), high = static_cast<int32_t>(y) == 0 ? 1 : static_cast<int32_t>(y);
  const int64_t results[8] = {
      x / y,
      x % y,
      low / high,
      static_cast<uint32_t>(low) % 10,
      static_cast<int64_t>(__umul64hi(ux, static_cast<uint64_t>(y))),
      __popcll(ux) + __clzll(x),
      static_cast<int8_t>(x) * static_cast<int16_t>(y),
      static_cast<int64_t>(ux >> (y & 63) | ux << (-y & 63)),
  };
  for (int j = 0; j < 8; ++j) out[j * n + i] = results[j];
}
