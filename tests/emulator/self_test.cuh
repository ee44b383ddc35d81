// Kernels that use every primitive the emulator has, and kernels with one error each. test_emulator.py runs them under
// the emulator and compiles them with nvcc, so that both are known to take the same source.
#pragma once

#include "core/philox.h"
#include "cuda/ptx.cuh"

namespace engram::cuda::self_test {

__device__ __forceinline__ int thread_in_block() {
  return static_cast<int>(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
}

// ---- positions, arithmetic

// Of each thread of the grid: its block, then its index.
__global__ void positions_kernel(int32_t* out) {
  const int block = static_cast<int>(blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z));
  const int threads = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  int32_t* own = out + 6 * (block * threads + thread_in_block());
  const unsigned numbers[6] = {blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z};
#pragma unroll
  for (int i = 0; i < 6; ++i) own[i] = static_cast<int32_t>(numbers[i]);
}

constexpr int kIntegerResults = 13;
__global__ void integer_functions_kernel(const uint32_t* a, const uint32_t* b, uint32_t* out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  const uint32_t x = __ldg(a + i), y = b[i];
  const auto wide = static_cast<unsigned long long>(x) << 32 | y;
  const uint32_t results[kIntegerResults] = {
      static_cast<uint32_t>(__popc(x)),
      static_cast<uint32_t>(__popcll(wide)),
      static_cast<uint32_t>(__clz(static_cast<int>(x))),
      static_cast<uint32_t>(__ffs(static_cast<int>(x))),
      __brev(x),
      __umulhi(x, y),
      __funnelshift_l(x, y, y % 32),
      __funnelshift_r(x, y, y % 32),
      __byte_perm(x, y, 0x7531u ^ (x & 0x1111u)),
      min(x, y),
      max(x, y),
      static_cast<uint32_t>(min(static_cast<int>(x), static_cast<int>(y))),
      static_cast<uint32_t>(max(static_cast<int>(x), static_cast<int>(y))),
  };
  for (int r = 0; r < kIntegerResults; ++r) out[r * n + i] = results[r];
}

constexpr int kFloatResults = 8;
__global__ void float_functions_kernel(const float* a, const float* b, float* out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  const float x = a[i], y = b[i];
  const float results[kFloatResults] = {__fadd_rn(x, y),
                                        __fsub_rn(x, y),
                                        __fmul_rn(x, y),
                                        __fdiv_rn(x, y),
                                        __fsqrt_rn(__uint_as_float(__float_as_uint(x) & 0x7FFFFFFFu)),
                                        __fadd_rn(__fmul_rn(x, y), x),
                                        min(x, y),
                                        max(x, y)};
  for (int r = 0; r < kFloatResults; ++r) out[r * n + i] = results[r];
}

// ---- collectives

// Of each lane: four kinds of shuffle of 32 bits, one of 64 (its halves added up) and one of a float.
constexpr int kShuffleResults = 6;
__global__ void shuffles_kernel(const int32_t* values, const int32_t* lanes, int32_t* out, int argument, int width) {
  const int lane = static_cast<int>(threadIdx.x);
  const int value = values[lane];
  const auto wide = static_cast<unsigned long long>(value) << 32 | static_cast<unsigned>(lane);
  out[lane] = __shfl_sync(kAllLanes, value, lanes[lane], width);
  out[kWarp + lane] = __shfl_up_sync(kAllLanes, value, static_cast<unsigned>(argument), width);
  out[2 * kWarp + lane] = __shfl_down_sync(kAllLanes, value, static_cast<unsigned>(argument), width);
  out[3 * kWarp + lane] = __shfl_xor_sync(kAllLanes, value, argument, width);
  const unsigned long long got = __shfl_sync(kAllLanes, wide, lanes[lane], width);
  out[4 * kWarp + lane] = static_cast<int32_t>(static_cast<unsigned>(got >> 32) + static_cast<unsigned>(got));
  out[5 * kWarp + lane] = static_cast<int32_t>(__shfl_xor_sync(kAllLanes, static_cast<float>(lane), argument, width));
}

// Of each lane: votes of the whole warp and of its half, which come to it at different times; reductions from sm_80 on.
constexpr int kVoteResults = 6, kReductions = 6;
__global__ void votes_kernel(const int32_t* values, int32_t* out) {
  const int lane = static_cast<int>(threadIdx.x);
  const int value = values[lane];
  const unsigned half = lane < 16 ? 0x0000FFFFu : 0xFFFF0000u;
  out[lane] = static_cast<int32_t>(__ballot_sync(kAllLanes, value > 0));
  out[kWarp + lane] = __any_sync(kAllLanes, value > 100);
  out[2 * kWarp + lane] = __all_sync(kAllLanes, value > -100);
  if (lane < 16) __syncwarp(half);
  out[3 * kWarp + lane] = static_cast<int32_t>(__ballot_sync(half, value > 0));
  out[4 * kWarp + lane] = __any_sync(half, value > 50);
  out[5 * kWarp + lane] = __all_sync(half, value > -50);
#if ENGRAM_ARCH >= 800
  int32_t* reduced = out + kVoteResults * kWarp + lane;
  reduced[0] = __reduce_add_sync(kAllLanes, value);
  reduced[kWarp] = __reduce_min_sync(kAllLanes, value);
  reduced[2 * kWarp] = __reduce_max_sync(kAllLanes, value);
  reduced[3 * kWarp] = static_cast<int32_t>(__reduce_max_sync(half, static_cast<unsigned>(value)));
  reduced[4 * kWarp] = static_cast<int32_t>(__reduce_or_sync(half, static_cast<unsigned>(value)));
  reduced[5 * kWarp] = static_cast<int32_t>(__reduce_and_sync(half, static_cast<unsigned>(value)));
#endif
}

// Of each thread, for several rounds: how many threads hold a true value, whether one does, whether all do.
__global__ void barriers_kernel(const int32_t* values, int32_t* out, int rounds) {
  const int thread = thread_in_block(), threads = static_cast<int>(blockDim.x);
  for (int round = 0; round < rounds; ++round) {
    const int value = values[round * threads + thread];
    int32_t* own = out + 3 * (round * threads + thread);
    own[0] = __syncthreads_count(value);
    own[1] = __syncthreads_or(value) != 0;
    own[2] = __syncthreads_and(value) != 0;
  }
}

// Each element is seen by all atomic operations, in shared memory and, from several blocks, in global.
constexpr int kBins = 8;
__global__ void atomics_kernel(const uint32_t* values, int n, int32_t* counts, uint32_t* results) {
  __shared__ int histogram[kBins];
  const int thread = thread_in_block();
  if (thread < kBins) histogram[thread] = 0;
  __syncthreads();
  for (int i = static_cast<int>(blockIdx.x * blockDim.x) + thread; i < n;
       i += static_cast<int>(gridDim.x * blockDim.x)) {
    const uint32_t value = values[i];
    atomicAdd(&histogram[value % kBins], 1);
    atomicAdd(&results[0], value);
    atomicOr(&results[1], value);
    atomicAnd(&results[2], value);
    atomicXor(&results[3], value);
    atomicMax(&results[4], value);
    atomicMin(&results[5], value);
    atomicSub(&results[6], 1u);
    if (i == 0) results[7] = atomicExch(&results[8], value);
    if (i == 1) results[9] = atomicCAS(&results[10], 5u, value);
  }
  __syncthreads();
  if (thread < kBins) atomicAdd(counts + thread, histogram[thread]);
}

// ---- fragments and matrix products

// Of each lane, four registers of each form. Rows lie in an order of their own, 16-byte pieces apart.
__global__ void load_matrices_kernel(const uint4* rows, const int32_t* places, uint32_t* out) {
  __shared__ alignas(16) uint4 pieces[kWarp][3];
  const int lane = static_cast<int>(threadIdx.x);
  uint4* own = &pieces[places[lane]][1];
  *own = rows[lane];
  __syncwarp();
  uint32_t plain[4], transposed[4];
  ptx::load_matrices(plain, own);
  ptx::load_matrices_transposed(transposed, own);
  for (int i = 0; i < 4; ++i) {
    out[lane * 4 + i] = plain[i];
    out[(kWarp + lane) * 4 + i] = transposed[i];
  }
}

enum class Product { kXor, kAnd, kBytes, kBFloat16 };

// c += a b on the registers of each lane. Twice, as kernels accumulate.
template <Product kProduct, typename Sum>
__global__ void product_kernel(const uint32_t* a, const uint32_t* b, Sum* c) {
  const int lane = static_cast<int>(threadIdx.x);
  [[maybe_unused]] const uint32_t own_a[4] = {a[lane * 4], a[lane * 4 + 1], a[lane * 4 + 2], a[lane * 4 + 3]};
  [[maybe_unused]] const uint32_t own_b[2] = {b[lane * 2], b[lane * 2 + 1]};
  Sum own_c[4] = {c[lane * 4], c[lane * 4 + 1], c[lane * 4 + 2], c[lane * 4 + 3]};
  for (int twice = 0; twice < 2; ++twice) {
#if ENGRAM_ARCH < 800
    if constexpr (kProduct == Product::kXor) ptx::mma_xor(own_c[0], own_c[1], own_a[0], own_b[0]);
#else
    if constexpr (kProduct == Product::kAnd) ptx::mma_and(own_c, own_a, own_b);
    if constexpr (kProduct == Product::kBytes) ptx::mma_bytes(own_c, own_a, own_b);
    if constexpr (kProduct == Product::kBFloat16) ptx::mma_bfloat16(own_c, own_a, own_b);
#endif
  }
  for (int i = 0; i < 4; ++i) c[lane * 4 + i] = own_c[i];
}

// ---- whole kernels

// out = in with rows reversed, by 16-byte copies, kStages deep. Pieces from `valid` on are written as zeros.
constexpr int kStages = 3, kCopyThreads = 64;
__global__ void __launch_bounds__(kCopyThreads) copies_kernel(const uint4* in, uint4* out, int rows, int valid) {
  __shared__ alignas(16) uint4 stages[kStages][kCopyThreads];
  const int thread = thread_in_block();
  const auto start = [&](int row) {
    if (row < rows) {
      const bool own = row * kCopyThreads + thread < valid;
      ptx::copy_16(&stages[row % kStages][thread], own ? in + row * kCopyThreads + thread : in, own);
    }
    ptx::commit_copies();
  };
  for (int row = 0; row < kStages - 1; ++row) start(row);
  for (int row = 0; row < rows; ++row) {
    ptx::wait_copies<kStages - 2>();
    __syncthreads();
    start(row + kStages - 1);
    out[row * kCopyThreads + thread] = stages[row % kStages][kCopyThreads - 1 - thread];
  }
}

// y[m,n] = popc(x[m] ^ w[n]) of one word per row: through shared memory, by warps that only synchronize within.
__global__ void differences_kernel(const uint64_t* x, const uint64_t* w, int32_t* y, int M, int N, int32_t* flag) {
  __shared__ uint64_t of_warp[4][kWarp];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int m = static_cast<int>(blockIdx.x) * 4 + warp;
  for (int n = 0; n < N; n += kWarp) {
    if (n + lane < N) of_warp[warp][lane] = w[n + lane];
    __syncwarp();
    if (m < M && n + (lane ^ 1) < N) y[m * N + n + (lane ^ 1)] = __popcll(x[m] ^ of_warp[warp][lane ^ 1]);
    __syncwarp();
  }
  *flag = 1;
}

// ---- errors, one each

enum class Fault : int {
  kNone,
  kReadBeyond,
  kReadBefore,
  kWriteBeyond,
  kWriteReadOnly,
  kCopyOfBytesBeyond,
  kMisaligned,
  kIndexBeyondSharedArray,
  kPointerBeyondSharedArray,
  kUninitialised,
  kUninitialisedRow,
  kNoBarrierBeforeRead,
  kNoBarrierBeforeWrite,
  kNoWarpBarrier,
  kShuffleForBarrier,
  kPlainWriteBesideAtomic,
  kBlocksWriteOneElement,
  kBlockReadsWhatAnotherWrites,
  kReturnBeforeBarrier,
  kDifferentBarriers,
  kLanesMissing,
  kLaneNotInMask,
  kShuffleFromOutside,
  kReturnedLaneInMask,
  kHalfWarpLoadsMatrices,
  kMisalignedRow,
  kRowNotShared,
  kShiftTooFar,
  kOverflow,
  kCopyToGlobal,
  kMisalignedCopy,
  kCopyFromBeyond,
  kCopyOverReads,
  // of asynchronous copies
  kCopyNotAwaited,
  kCopyAwaitedTooLittle,
  kCopyWithoutBarrier,
  kCopyTwice,
  kCopyInFlightAtReturn,
  kSourceChanged,
};

// 64 threads. x [n], n >= 64, and y [n], n a multiple of 4. `zero` is 0, which the compiler must not know.
constexpr int kFaultyThreads = 64;
__global__ void __launch_bounds__(kFaultyThreads)
    faulty_kernel(Fault fault, const int32_t* x, int32_t* y, int n, int zero) {
  __shared__ alignas(16) int32_t values[kFaultyThreads];
  __shared__ alignas(16) int32_t others[kFaultyThreads];
  __shared__ alignas(16) uint4 pieces[2][kFaultyThreads];
  const int thread = thread_in_block(), lane = thread % kWarp;
  const int across = kFaultyThreads - 1 - thread, neighbour = thread ^ 1;
  const auto* x_pieces = reinterpret_cast<const uint4*>(x);
  auto* y_pieces = reinterpret_cast<uint4*>(y);
  const bool one = thread == 5;
  uint32_t r[4] = {};
  switch (fault) {
    case Fault::kNone:
      break;
    case Fault::kReadBeyond:
      if (one) y[0] = x[n + zero];
      break;
    case Fault::kReadBefore:
      if (one) y[0] = x[zero - 1];
      break;
    case Fault::kWriteBeyond:
      if (one) y[n + zero] = 1;
      break;
    case Fault::kWriteReadOnly:
      if (one) const_cast<int32_t*>(x)[3] = 1;
      break;
    case Fault::kCopyOfBytesBeyond:
      if (one) memcpy(y, x + 1, sizeof(int32_t) * static_cast<size_t>(n + zero));
      break;
    case Fault::kMisaligned:
      if (one) y_pieces[0] = *reinterpret_cast<const uint4*>(x + 2);
      break;
    case Fault::kIndexBeyondSharedArray:
      values[thread + 1 + zero] = 1;
      break;
    case Fault::kPointerBeyondSharedArray: {
      int32_t* end = values + zero + kFaultyThreads;
      if (one) *end = 1;
      break;
    }
    case Fault::kUninitialised:
      if (!one) values[thread] = 1;
      __syncthreads();
      y[thread] = values[across];
      break;
    case Fault::kUninitialisedRow:
      if (!one) pieces[0][thread] = x_pieces[0];
      __syncthreads();
      ptx::load_matrices(r, &pieces[0][lane]);
      y[thread] = static_cast<int32_t>(r[0]);
      break;
    case Fault::kNoBarrierBeforeRead:
      values[thread] = x[thread];
      y[thread] = values[across];
      break;
    case Fault::kNoBarrierBeforeWrite:
      values[thread] = x[thread];
      __syncthreads();
      y[thread] = values[across];
      values[thread] = 1;
      break;
    case Fault::kNoWarpBarrier:
      values[thread] = x[thread];
      y[thread] = values[neighbour];
      break;
    case Fault::kShuffleForBarrier:
      values[thread] = __shfl_xor_sync(kAllLanes, thread, 1);
      __shfl_xor_sync(kAllLanes, thread, 1);
      y[thread] = values[neighbour];
      break;
    case Fault::kPlainWriteBesideAtomic:
      values[thread] = 0;
      __syncthreads();
      if (one)
        values[0] = 1;
      else
        atomicAdd(&values[0], 1);
      break;
    case Fault::kBlocksWriteOneElement:
      if (one) y[7] = static_cast<int32_t>(blockIdx.x);
      break;
    case Fault::kBlockReadsWhatAnotherWrites:
      if (blockIdx.x == 0) {
        if (one) y[7] = 1;
      } else if (one) {
        y[8 + blockIdx.x] = y[7];
      }
      break;
    case Fault::kReturnBeforeBarrier:
      if (one) return;
      __syncthreads();
      break;
    case Fault::kDifferentBarriers:
      if (one)
        __syncthreads();
      else
        __syncthreads();
      break;
    case Fault::kLanesMissing:
      if (lane < 16) y[thread] = __shfl_xor_sync(kAllLanes, thread, 1);
      break;
    case Fault::kLaneNotInMask:
      y[thread] = static_cast<int32_t>(__ballot_sync(0x0000FFFFu, thread));
      break;
    case Fault::kShuffleFromOutside:
      if (lane < 16) y[thread] = __shfl_sync(0x0000FFFFu, thread, 20);
      break;
    case Fault::kReturnedLaneInMask:
      if (one) return;
      __syncwarp();
      break;
    case Fault::kHalfWarpLoadsMatrices:
      pieces[0][thread] = x_pieces[0];
      __syncthreads();
      if (lane < 16) ptx::load_matrices(r, &pieces[0][lane]);
      y[thread] = static_cast<int32_t>(r[0]);
      break;
    case Fault::kMisalignedRow:
      pieces[0][thread] = x_pieces[0];
      __syncthreads();
      ptx::load_matrices(r, reinterpret_cast<const char*>(&pieces[0][lane]) + 8 * one);
      y[thread] = static_cast<int32_t>(r[0]);
      break;
    case Fault::kRowNotShared:
      ptx::load_matrices(r, x_pieces);
      y[thread] = static_cast<int32_t>(r[0]);
      break;
    case Fault::kShiftTooFar:
      y[thread] = 1 << (thread + zero);
      break;
    case Fault::kOverflow:
      y[thread] = 0x7FFFFFFF - 10 + thread + zero;
      break;
    case Fault::kCopyToGlobal:
      ptx::copy_16(y_pieces, x_pieces, true);
      break;
    case Fault::kMisalignedCopy:
      ptx::copy_16(&pieces[0][thread], x + 1, true);
      break;
    case Fault::kCopyFromBeyond:
      if (one) ptx::copy_16(&pieces[0][thread], x_pieces + n / 4, true);
      break;
    case Fault::kCopyOverReads:
      pieces[0][thread] = x_pieces[0];
      __syncthreads();
      y[thread] = static_cast<int32_t>(pieces[0][across].x);
      ptx::copy_16(&pieces[0][thread], x_pieces, true);
      ptx::commit_copies();
      ptx::wait_copies<0>();
      break;
    case Fault::kCopyNotAwaited:
      ptx::copy_16(&pieces[0][thread], x_pieces, true);
      ptx::commit_copies();
      __syncthreads();
      y[thread] = static_cast<int32_t>(pieces[0][thread].x);
      break;
    case Fault::kCopyAwaitedTooLittle:
      for (int stage = 0; stage < 2; ++stage) {
        ptx::copy_16(&pieces[stage][thread], x_pieces, true);
        ptx::commit_copies();
      }
      ptx::wait_copies<1>();
      __syncthreads();
      y[thread] = static_cast<int32_t>(pieces[1][thread].x);
      break;
    case Fault::kCopyWithoutBarrier:
      ptx::copy_16(&pieces[0][thread], x_pieces, true);
      ptx::commit_copies();
      ptx::wait_copies<0>();
      y[thread] = static_cast<int32_t>(pieces[0][across].x);
      break;
    case Fault::kCopyTwice:
      for (int twice = 0; twice < 2; ++twice) ptx::copy_16(&pieces[0][thread], x_pieces, true);
      ptx::commit_copies();
      ptx::wait_copies<0>();
      break;
    case Fault::kCopyInFlightAtReturn:
      ptx::copy_16(&pieces[0][thread], x_pieces, true);
      break;
    case Fault::kSourceChanged:
      if (one) {
        ptx::copy_16(&pieces[0][thread], y_pieces, true);
        ptx::commit_copies();
        ++y[0];
        ptx::wait_copies<0>();
      }
      break;
  }
  // kept, lest the arrays are optimized away
  if (zero != 0) y[0] = others[thread];
}

// ---- launchers

inline cudaError_t launch_positions(int32_t* out, dim3 grid, dim3 block, cudaStream_t stream) {
  ENGRAM_LAUNCH(positions_kernel, grid, block, stream, out);
  return cudaGetLastError();
}

inline cudaError_t launch_integer_functions(const uint32_t* a, const uint32_t* b, uint32_t* out, int n,
                                            cudaStream_t stream) {
  ENGRAM_LAUNCH(integer_functions_kernel, (n + 63) / 64, 64, stream, a, b, out, n);
  return cudaGetLastError();
}

inline cudaError_t launch_float_functions(const float* a, const float* b, float* out, int n, cudaStream_t stream) {
  ENGRAM_LAUNCH(float_functions_kernel, (n + 63) / 64, 64, stream, a, b, out, n);
  return cudaGetLastError();
}

inline cudaError_t launch_shuffles(const int32_t* values, const int32_t* lanes, int32_t* out, int argument, int width,
                                   cudaStream_t stream) {
  ENGRAM_LAUNCH(shuffles_kernel, 1, kWarp, stream, values, lanes, out, argument, width);
  return cudaGetLastError();
}

inline cudaError_t launch_votes(const int32_t* values, int32_t* out, cudaStream_t stream) {
  ENGRAM_LAUNCH(votes_kernel, 1, kWarp, stream, values, out);
  return cudaGetLastError();
}

inline cudaError_t launch_barriers(const int32_t* values, int32_t* out, int rounds, int threads, cudaStream_t stream) {
  ENGRAM_LAUNCH(barriers_kernel, 1, static_cast<unsigned>(threads), stream, values, out, rounds);
  return cudaGetLastError();
}

inline cudaError_t launch_atomics(const uint32_t* values, int n, int32_t* counts, uint32_t* results,
                                  cudaStream_t stream) {
  ENGRAM_LAUNCH(atomics_kernel, 3, 64, stream, values, n, counts, results);
  return cudaGetLastError();
}

inline cudaError_t launch_load_matrices(const uint4* rows, const int32_t* places, uint32_t* out, cudaStream_t stream) {
  ENGRAM_LAUNCH(load_matrices_kernel, 1, kWarp, stream, rows, places, out);
  return cudaGetLastError();
}

inline cudaError_t launch_product(Product product, const uint32_t* a, const uint32_t* b, void* c, cudaStream_t stream) {
  auto* sums = static_cast<int32_t*>(c);
  switch (product) {
    case Product::kXor: {
      const auto kernel = product_kernel<Product::kXor, int32_t>;
      ENGRAM_LAUNCH(kernel, 1, kWarp, stream, a, b, sums);
      break;
    }
    case Product::kAnd: {
      const auto kernel = product_kernel<Product::kAnd, int32_t>;
      ENGRAM_LAUNCH(kernel, 1, kWarp, stream, a, b, sums);
      break;
    }
    case Product::kBytes: {
      const auto kernel = product_kernel<Product::kBytes, int32_t>;
      ENGRAM_LAUNCH(kernel, 1, kWarp, stream, a, b, sums);
      break;
    }
    case Product::kBFloat16: {
      const auto kernel = product_kernel<Product::kBFloat16, float>;
      ENGRAM_LAUNCH(kernel, 1, kWarp, stream, a, b, static_cast<float*>(c));
      break;
    }
  }
  return cudaGetLastError();
}

inline cudaError_t launch_copies(const uint4* in, uint4* out, int rows, int valid, cudaStream_t stream) {
  ENGRAM_LAUNCH(copies_kernel, 1, kCopyThreads, stream, in, out, rows, valid);
  return cudaGetLastError();
}

inline cudaError_t launch_differences(const uint64_t* x, const uint64_t* w, int32_t* y, int M, int N, int32_t* flag,
                                      cudaStream_t stream) {
  ENGRAM_LAUNCH(differences_kernel, (M + 3) / 4, 4 * kWarp, stream, x, w, y, M, N, flag);
  return cudaGetLastError();
}

inline cudaError_t launch_faulty(Fault fault, const int32_t* x, int32_t* y, int n, int zero, cudaStream_t stream) {
  ENGRAM_LAUNCH(faulty_kernel, 3, kFaultyThreads, stream, fault, x, y, n, zero);
  return cudaGetLastError();
}

}  // namespace engram::cuda::self_test
