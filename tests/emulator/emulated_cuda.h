// CUDA for a C++ compiler: what csrc/cuda/device.cuh includes in place of <cuda_runtime.h>, so that the kernels which
// nvcc compiles also run on a CPU. README.md says what is emulated and what is checked.
//
// Every thread of a block is a fiber; emulator.cpp runs them one at a time and switches only where a thread has to wait
// for others. Names are CUDA's and mean what the CUDA C++ Programming Guide says; what is missing here, no kernel has
// needed yet. The last argument of a function that waits or touches memory is its place in the kernel's source, given
// by default and named in errors.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

// ---- declarations

#define __host__
#define __device__
// Without linkage, lest two libraries in one process share the shared arrays of a kernel.
#define __global__ [[maybe_unused]] static
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

// Blocks run one after another, so that one instance of a shared array serves them all. It is local to the thread of
// the host only because that is what gathers the arrays of a library in one place, whose bounds are known (GCC ignores
// section attributes within templates). A guard beside each array turns what runs beyond its end into an error.
#define ENGRAM_JOIN_TOKENS(a, b) a##b
#define ENGRAM_JOIN(a, b) ENGRAM_JOIN_TOKENS(a, b)
#define ENGRAM_IN_SHARED static thread_local __attribute__((used))
#define __shared__                                                                                  \
  ENGRAM_IN_SHARED __attribute__((aligned(256))) char ENGRAM_JOIN(engram_guard_, __COUNTER__)[256]; \
  ENGRAM_IN_SHARED
#if defined(ENGRAM_EMULATED)
// CUDA takes alignas after __shared__; GCC takes only its own spelling there. Headers of the standard library that a
// host file needs come before kernels.
#define alignas(bytes) __attribute__((aligned(bytes)))
#endif

// ---- types

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

#define ENGRAM_VECTORS(Number, name)                                                                            \
  struct __attribute__((aligned(2 * sizeof(Number)))) name##2 { Number x, y; };                                 \
  struct __attribute__((aligned(sizeof(Number) < 4 ? 4 * sizeof(Number) : 16))) name##4 { Number x, y, z, w; }; \
  static inline name##2 make_##name##2(Number x, Number y) { return {x, y}; }                                   \
  static inline name##4 make_##name##4(Number x, Number y, Number z, Number w) { return {x, y, z, w}; }
ENGRAM_VECTORS(int8_t, char)
ENGRAM_VECTORS(uint8_t, uchar)
ENGRAM_VECTORS(int16_t, short)
ENGRAM_VECTORS(uint16_t, ushort)
ENGRAM_VECTORS(int, int)
ENGRAM_VECTORS(unsigned, uint)
ENGRAM_VECTORS(long long, longlong)
ENGRAM_VECTORS(unsigned long long, ulonglong)
ENGRAM_VECTORS(float, float)
ENGRAM_VECTORS(double, double)
#undef ENGRAM_VECTORS

// ---- the runtime's functions that launchers use

using cudaStream_t = struct CUstream_st*;
enum cudaError_t : int { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr : int { cudaDevAttrMultiProcessorCount = 16 };

// An error stays, as a kernel's error does in CUDA: later launches do nothing and return it.
cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream);

// ---- the emulator

namespace engram::emulator {

struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file_ = __builtin_FILE(), int line_ = __builtin_LINE()) {
    return {file_, line_};
  }
};

// Constant for a thread, whatever runs in between.
[[gnu::const]] uint3 thread_index();
[[gnu::const]] uint3 block_index();
[[gnu::const]] dim3 block_dimensions();
[[gnu::const]] dim3 grid_dimensions();

enum class Shuffle { kFrom, kUp, kDown, kXor };
enum class Reduction { kAdd, kMin, kMax, kAnd, kOr, kXor };

// What threads do together. `mask`: the lanes of a warp that take part.
int count_at_barrier(bool predicate, Site site);
void synchronize_warp(unsigned mask, Site site);
uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t bits, unsigned argument, int width, Site site);
unsigned ballot(unsigned mask, bool predicate, Site site);
int64_t reduce(Reduction kind, unsigned mask, int64_t value, Site site);

// Before an atomic operation reads and writes.
void begin_atomic(const void* p, size_t bytes, Site site);

void run(const void* kernel, dim3 grid, dim3 block, void (*thread)(const void* call), const void* call, size_t bytes);

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t, Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
  };
  const Call call{kernel, {std::forward<Arguments>(arguments)...}};
  const auto thread = [](const void* p) {
    const auto* own = static_cast<const Call*>(p);
    std::apply(own->kernel, own->parameters);
  };
  run(reinterpret_cast<const void*>(kernel), grid, block, thread, &call, sizeof call);
}

template <class T>
T shuffle_number(Shuffle kind, unsigned mask, T value, unsigned argument, int width, Site site) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "CUDA shuffles 4 or 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = shuffle(kind, mask, bits, argument, width, site);
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Not instrumented: begin_atomic is what the checker sees.
template <class T, class Update>
[[gnu::no_sanitize_thread]] T update_atomically(T* p, Site site, Update update) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "CUDA's atomic operations are on 4 or 8 bytes");
  begin_atomic(p, sizeof(T), site);
  const T old = *p;
  *p = update(old);
  return old;
}

template <class T>
struct Same {
  using Type = T;
};
// A parameter of this type takes what converts to T and does not take part in deducing it.
template <class T>
using Number = typename Same<T>::Type;

}  // namespace engram::emulator

#define threadIdx (::engram::emulator::thread_index())
#define blockIdx (::engram::emulator::block_index())
#define blockDim (::engram::emulator::block_dimensions())
#define gridDim (::engram::emulator::grid_dimensions())
constexpr int warpSize = 32;

#define ENGRAM_LAUNCH(kernel, grid, block, stream, ...) \
  ::engram::emulator::launch(kernel, grid, block, stream, __VA_ARGS__)

#define ENGRAM_SITE ::engram::emulator::Site site = ::engram::emulator::Site::here()

// ---- barriers and collectives

inline void __syncthreads(ENGRAM_SITE) { engram::emulator::count_at_barrier(false, site); }
inline int __syncthreads_count(int predicate, ENGRAM_SITE) {
  return engram::emulator::count_at_barrier(predicate != 0, site);
}
inline int __syncthreads_or(int predicate, ENGRAM_SITE) {
  return engram::emulator::count_at_barrier(predicate != 0, site) != 0;
}
inline int __syncthreads_and(int predicate, ENGRAM_SITE) {
  return engram::emulator::count_at_barrier(predicate == 0, site) == 0;
}

inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, ENGRAM_SITE) { engram::emulator::synchronize_warp(mask, site); }

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize, ENGRAM_SITE) {
  using engram::emulator::Shuffle;
  return engram::emulator::shuffle_number(Shuffle::kFrom, mask, value, static_cast<unsigned>(lane), width, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, ENGRAM_SITE) {
  return engram::emulator::shuffle_number(engram::emulator::Shuffle::kUp, mask, value, delta, width, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, ENGRAM_SITE) {
  return engram::emulator::shuffle_number(engram::emulator::Shuffle::kDown, mask, value, delta, width, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize, ENGRAM_SITE) {
  using engram::emulator::Shuffle;
  return engram::emulator::shuffle_number(Shuffle::kXor, mask, value, static_cast<unsigned>(lanes), width, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, ENGRAM_SITE) {
  return engram::emulator::ballot(mask, predicate != 0, site);
}
inline int __any_sync(unsigned mask, int predicate, ENGRAM_SITE) {
  return engram::emulator::ballot(mask, predicate != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, ENGRAM_SITE) {
  return engram::emulator::ballot(mask, predicate == 0, site) == 0;
}

#if ENGRAM_EMULATED >= 800
#define ENGRAM_REDUCE(name, kind, Number)                                                                      \
  inline Number name(unsigned mask, Number value, ENGRAM_SITE) {                                               \
    return static_cast<Number>(                                                                                \
        engram::emulator::reduce(engram::emulator::Reduction::kind, mask, static_cast<int64_t>(value), site)); \
  }
ENGRAM_REDUCE(__reduce_add_sync, kAdd, int)
ENGRAM_REDUCE(__reduce_add_sync, kAdd, unsigned)
ENGRAM_REDUCE(__reduce_min_sync, kMin, int)
ENGRAM_REDUCE(__reduce_min_sync, kMin, unsigned)
ENGRAM_REDUCE(__reduce_max_sync, kMax, int)
ENGRAM_REDUCE(__reduce_max_sync, kMax, unsigned)
ENGRAM_REDUCE(__reduce_and_sync, kAnd, unsigned)
ENGRAM_REDUCE(__reduce_or_sync, kOr, unsigned)
ENGRAM_REDUCE(__reduce_xor_sync, kXor, unsigned)
#undef ENGRAM_REDUCE
#endif

// ---- atomic operations

#define ENGRAM_ATOMIC(name, ...)                                                                      \
  template <class T>                                                                                  \
  T name(T* p, engram::emulator::Number<T> value, ENGRAM_SITE) {                                      \
    return engram::emulator::update_atomically(p, site, [value](T old) -> T { return __VA_ARGS__; }); \
  }
ENGRAM_ATOMIC(atomicAdd, old + value)
ENGRAM_ATOMIC(atomicSub, old - value)
ENGRAM_ATOMIC(atomicMin, value < old ? value : old)
ENGRAM_ATOMIC(atomicMax, old < value ? value : old)
ENGRAM_ATOMIC(atomicAnd, old& value)
ENGRAM_ATOMIC(atomicOr, old | value)
ENGRAM_ATOMIC(atomicXor, old ^ value)
ENGRAM_ATOMIC(atomicExch, (static_cast<void>(old), value))
#undef ENGRAM_ATOMIC

template <class T>
T atomicCAS(T* p, engram::emulator::Number<T> expected, engram::emulator::Number<T> value, ENGRAM_SITE) {
  return engram::emulator::update_atomically(p, site, [=](T old) -> T { return old == expected ? value : old; });
}

#undef ENGRAM_SITE

// ---- arithmetic

template <class T>
T __ldg(const T* p) {
  return *p;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (x >> bit & 1u) << (31 - bit);
  return reversed;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32); }
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((((static_cast<uint64_t>(high) << 32) | low) << (shift % 32)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((static_cast<uint64_t>(high) << 32) | low) >> (shift % 32));
}
// Four bytes out of the eight of y, x: the selector's hexadecimal digits, of which the top bit would repeat a sign.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = (static_cast<uint64_t>(y) << 32) | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i)
    result |= static_cast<unsigned>(bytes >> (8 * (selector >> (4 * i) & 7u)) & 0xFFu) << (8 * i);
  return result;
}

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }

// Compiled without contraction, every operation of float rounds by itself.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }

// Of integers, also of two types; of floats, the number where the other is NaN.
template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmin(static_cast<T>(a), static_cast<T>(b));
  return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmax(static_cast<T>(a), static_cast<T>(b));
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}
