// Denormal numbers and rounding to nearest, whatever mode the calling thread is in.
//
// torch.set_flush_denormal takes effect in the thread that calls it and in those that begin later: in a thread pool
// some flush and some do not, and a result would depend on which of them computed it. Kernels run in the mode a process
// starts in. Setting it takes some 20 cycles, once for each share of an operator's work.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace engram::cpu {

class DefaultFloatMode {
 public:
#if defined(__x86_64__)
  DefaultFloatMode() : before_(_mm_getcsr()) { _mm_setcsr(before_ & ~(kFlush | kRounding)); }
  ~DefaultFloatMode() { _mm_setcsr(before_); }
#elif defined(__aarch64__)
  DefaultFloatMode() {
    asm volatile("mrs %0, fpcr" : "=r"(before_)::"memory");
    asm volatile("msr fpcr, %0" ::"r"(before_ & ~(kFlush | kRounding)) : "memory");
  }
  ~DefaultFloatMode() { asm volatile("msr fpcr, %0" ::"r"(before_) : "memory"); }
#else
  DefaultFloatMode() {}
#endif
  DefaultFloatMode(const DefaultFloatMode&) = delete;
  DefaultFloatMode& operator=(const DefaultFloatMode&) = delete;

 private:
#if defined(__x86_64__)
  static constexpr unsigned kFlush = 1u << 15 | 1u << 6, kRounding = 3u << 13;  // FTZ, DAZ and RC of MXCSR
  unsigned before_;
#elif defined(__aarch64__)
  static constexpr uint64_t kFlush = 1u << 24 | 1u << 19 | 1u << 0, kRounding = 3u << 22;  // FZ, FZ16, FIZ and RMode
  uint64_t before_;
#endif
};

}  // namespace engram::cpu
