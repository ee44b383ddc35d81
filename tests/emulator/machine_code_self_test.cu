// Kernels whose machine code is known: see test_machine_code.py.
#include <cstdint>

// Holds more numbers across a barrier than the 64 registers that a thread of 1024 can have, and so spills.
extern "C" __global__ void __launch_bounds__(1024) spilling(const float* x, float* y) {
  float held[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) held[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 96; ++i) y[threadIdx.x * 96 + i] = held[i] - held[(i + 1) % 96];
}

// An array that is indexed at run time: on the stack, though nothing spills.
extern "C" __global__ void indexing(const int* x, int* y) {
  int held[16] = {};
  for (int i = 0; i < 32; ++i) held[x[i] & 15] += i;
  y[threadIdx.x] = held[x[threadIdx.x] & 15];
}

// 16 bytes a load and store, 256 bytes of shared memory.
extern "C" __global__ void __launch_bounds__(128) wide(const uint4* x, uint4* y) {
  __shared__ uint32_t sums[64];
  const uint4 v = x[threadIdx.x];
  sums[threadIdx.x % 64] = v.x;
  __syncthreads();
  y[threadIdx.x] = make_uint4(v.w, v.z, v.y, sums[threadIdx.x % 32]);
}

// The inner of two loops counts bits.
extern "C" __global__ void counting(const uint32_t* a, const uint32_t* b, int* y, int rows, int words) {
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    int count = 0;
#pragma unroll 1
    for (int i = 0; i < words; i += 4) {
#pragma unroll
      for (int j = 0; j < 4; ++j) count += __popc(a[row * words + i + j] ^ b[i + j]);
    }
    y[row] = count;
  }
}

// One binary product per turn of a loop.
extern "C" __global__ void multiplying(const uint32_t* a, const uint32_t* b, int* y, int steps) {
  const int lane = threadIdx.x;
#if __CUDA_ARCH__ >= 800
  int c[4] = {};
#pragma unroll 1
  for (int i = 0; i < steps; ++i) {
    const uint4 x = reinterpret_cast<const uint4*>(a)[i * 32 + lane];
    const uint2 w = reinterpret_cast<const uint2*>(b)[i * 32 + lane];
    asm volatile(
        "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(w.x), "r"(w.y));
  }
  for (int i = 0; i < 4; ++i) y[lane * 4 + i] = c[i];
#else
  int c0 = 0, c1 = 0;
#pragma unroll 1
  for (int i = 0; i < steps; ++i)
    asm volatile("mma.sync.aligned.m8n8k128.row.col.s32.b1.b1.s32.xor.popc {%0, %1}, {%2}, {%3}, {%0, %1};"
                 : "+r"(c0), "+r"(c1)
                 : "r"(a[i * 32 + lane]), "r"(b[i * 32 + lane]));
  y[lane * 2] = c0, y[lane * 2 + 1] = c1;
#endif
}
