// The table of this compilation's kernels, by which launch.cpp reaches them.
#include "cpu/tables.h"

#include "cpu/simd.h"

namespace engram::cpu::ENGRAM_ISA {

namespace {

#if defined(ENGRAM_HAS_SUBSET_LOOK_UP)
constexpr auto kGroupedProduct = grouped_product;
#else
constexpr decltype(Kernels::grouped_product) kGroupedProduct = nullptr;
#endif

}  // namespace

#define ENGRAM_ENTRY(Result, name, Arguments, Part) name,
#if defined(ENGRAM_PREDICTION_ONLY)  // the operators that call the others are not linked either
#define ENGRAM_TRAINING_ENTRY(Result, name, Arguments, Part) nullptr,
#else
#define ENGRAM_TRAINING_ENTRY ENGRAM_ENTRY
#endif
extern const Kernels kernels;
const Kernels kernels = {
    ENGRAM_TEXT(ENGRAM_ISA), 2 * kBitLanes,
    kGatedTileRows,          kGateParts,
    kGroupedProduct,         ENGRAM_PREDICTION_KERNELS(ENGRAM_ENTRY) ENGRAM_TRAINING_KERNELS(ENGRAM_TRAINING_ENTRY)};
#undef ENGRAM_TRAINING_ENTRY
#undef ENGRAM_ENTRY

}  // namespace engram::cpu::ENGRAM_ISA
