// The table of this compilation's kernels, by which launch.cpp reaches them.
#include "cpu/tables.h"

#include "cpu/simd.h"

namespace engram::cpu::ENGRAM_ISA {

#define ENGRAM_ENTRY(Result, name, Arguments, Part) name,
extern const Kernels kernels;
const Kernels kernels = {ENGRAM_TEXT(ENGRAM_ISA), 2 * kBitLanes, kGateParts, ENGRAM_CPU_KERNELS(ENGRAM_ENTRY)};
#undef ENGRAM_ENTRY

}  // namespace engram::cpu::ENGRAM_ISA
