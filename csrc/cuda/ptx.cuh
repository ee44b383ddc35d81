// The only inline PTX: asynchronous copies, fragment loads and matrix products of one warp. tests/emulator gives the
// same functions in C++, and the PTX itself is interpreted against them.
//
// Fragments (PTX ISA, "Matrix fragments for mma"). Lane l of a warp: group = l / 4, quad = l % 4. A register holds 4
// bytes of a row: 32 bits, 4 int8 or 2 bfloat16. In all three products a row of the tile is 32 bytes along the
// contraction, so that the fragments of all are loaded by the same code:
//
//            bytes 0 .. 15    16 .. 31                        columns 0 .. 7
//   rows 0 .. 7     a[0]        a[2]        c[0], c[1]:  row group,     columns 2 quad, 2 quad + 1
//   rows 8 .. 15    a[1]        a[3]        c[2], c[3]:  row group + 8, columns 2 quad, 2 quad + 1
//   a[i]: row group (+ 8), bytes 4 quad .. 4 quad + 3 (+ 16)
//   b[0], b[1]: column group, bytes 4 quad .. 4 quad + 3 (+ 16)
#pragma once

#include "cuda/device.cuh"

#if defined(ENGRAM_EMULATED)
#include "emulated_ptx.h"
#else

namespace engram::cuda::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies 16 bytes to shared memory, or zeros there if not `valid`. In flight until wait_copies. Both 16-byte aligned.
__device__ __forceinline__ void copy_16(void* to_shared, const void* from_global, bool valid) {
#if ENGRAM_ARCH >= 800
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to_shared)), "l"(from_global),
               "r"(bytes)
               : "memory");
#else
  *static_cast<uint4*>(to_shared) = valid ? *static_cast<const uint4*>(from_global) : make_uint4(0, 0, 0, 0);
#endif
}

// Closes a group of copies.
__device__ __forceinline__ void commit_copies() {
#if ENGRAM_ARCH >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most kGroups of this thread's latest groups are in flight.
template <int kGroups>
__device__ __forceinline__ void wait_copies() {
#if ENGRAM_ARCH >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#endif
}

// Four 8 x 16-byte matrices from shared memory: lane l gives the address of row l % 8 of matrix l / 8, and gets of
// matrix i in r[i] bytes 4 quad .. 4 quad + 3 of row `group`.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// Likewise of 8 x 8 two-byte elements, transposed: r[i] gets elements (2 quad, group) and (2 quad + 1, group).
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

#if ENGRAM_ARCH < 800
// c += popc(a ^ b), 8 x 8 x 128 bits: rows `group` of a and columns `group` of b in one register each.
__device__ __forceinline__ void mma_xor(int32_t& c0, int32_t& c1, uint32_t a, uint32_t b) {
  asm volatile("mma.sync.aligned.m8n8k128.row.col.s32.b1.b1.s32.xor.popc {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+r"(c0), "+r"(c1)
               : "r"(a), "r"(b));
}
#else

#define ENGRAM_MMA(shape_and_types, constraint)                                                                       \
  asm volatile("mma.sync.aligned." shape_and_types " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+" constraint(c[0]), "+" constraint(c[1]), "+" constraint(c[2]), "+" constraint(c[3])               \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

// c += popc(a & b), 16 x 8 x 256 bits.
__device__ __forceinline__ void mma_and(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  ENGRAM_MMA("m16n8k256.row.col.s32.b1.b1.s32.and.popc", "r");
}

// c += a * b, 16 x 8 x 32 of uint8 and int8.
__device__ __forceinline__ void mma_bytes(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  ENGRAM_MMA("m16n8k32.row.col.s32.u8.s8.s32", "r");
}

// c += a * b, 16 x 8 x 16 of bfloat16, summed in float32.
__device__ __forceinline__ void mma_bfloat16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  ENGRAM_MMA("m16n8k16.row.col.f32.bf16.bf16.f32", "f");
}

#undef ENGRAM_MMA
#endif

}  // namespace engram::cuda::ptx

#endif
