// The functions of csrc/cuda/ptx.cuh in C++, for csrc/cuda/ptx.cuh to include in place of its inline PTX. What each
// does and how fragments are laid out is said there; emulator.cpp does it, by the definitions.
//
// All lanes of the warp must take part; addresses must be aligned to 16 bytes, and to shared memory where ptx.cuh says
// so. Only what the emulated architecture has is declared.
#pragma once

#include "emulated_cuda.h"

namespace engram::emulator {

// In flight until wait_for_copies; may land at any time until then.
void copy_asynchronously(void* to_shared, const void* from_global, bool valid, Site site);
void copy_at_once(void* to_shared, const void* from_global, bool valid, Site site);
void commit_copies();
void wait_for_copies(unsigned groups_left, Site site);

void load_matrices(uint32_t (&r)[4], const void* row, bool transposed, Site site);

void mma_xor(int32_t& c0, int32_t& c1, uint32_t a, uint32_t b, Site site);
void mma_and(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site);
void mma_bytes(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site);
void mma_bfloat16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site);

}  // namespace engram::emulator

namespace engram::cuda::ptx {

using emulator::Site;

inline void copy_16(void* to_shared, const void* from_global, bool valid, Site site = Site::here()) {
#if ENGRAM_EMULATED >= 800
  emulator::copy_asynchronously(to_shared, from_global, valid, site);
#else
  emulator::copy_at_once(to_shared, from_global, valid, site);
#endif
}

inline void commit_copies() { emulator::commit_copies(); }

template <int kGroups>
void wait_copies(Site site = Site::here()) {
  static_assert(kGroups >= 0);
  emulator::wait_for_copies(kGroups, site);
}

inline void load_matrices(uint32_t (&r)[4], const void* row, Site site = Site::here()) {
  emulator::load_matrices(r, row, false, site);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row, Site site = Site::here()) {
  emulator::load_matrices(r, row, true, site);
}

#if ENGRAM_EMULATED < 800
inline void mma_xor(int32_t& c0, int32_t& c1, uint32_t a, uint32_t b, Site site = Site::here()) {
  emulator::mma_xor(c0, c1, a, b, site);
}
#else
inline void mma_and(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = Site::here()) {
  emulator::mma_and(c, a, b, site);
}
inline void mma_bytes(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = Site::here()) {
  emulator::mma_bytes(c, a, b, site);
}
inline void mma_bfloat16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = Site::here()) {
  emulator::mma_bfloat16(c, a, b, site);
}
#endif

}  // namespace engram::cuda::ptx
