// Declares this compilation's kernels; tables.cpp gathers them into the Kernels of the instruction set.
#pragma once

#include "cpu/kernels.h"

namespace engram::cpu::ENGRAM_ISA {

void grouped_product(const GroupedProduct& p, Block part);
#define ENGRAM_DECLARE(Result, name, Arguments, Part) Result name(const Arguments& p, Part part);
ENGRAM_CPU_KERNELS(ENGRAM_DECLARE)
#undef ENGRAM_DECLARE

}  // namespace engram::cpu::ENGRAM_ISA
