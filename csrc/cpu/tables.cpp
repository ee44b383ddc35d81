// The table of this compilation's kernels, by which launch.cpp reaches them.
#include "cpu/tables.h"

#include "cpu/simd.h"

#define ENGRAM_TEXT_(x) #x
#define ENGRAM_TEXT(x) ENGRAM_TEXT_(x)

namespace engram::cpu::ENGRAM_ISA {

extern const Kernels kernels;
const Kernels kernels = {
    ENGRAM_TEXT(ENGRAM_ISA),
    2 * kBitLanes,
    kGateParts,
    pack_signs,
    pack_window,
    unpack_signs,
    popcount_rows,
    pack_reached,
    transpose_bits,
    zero_unrecruited,
    split_gates,
    binary_matmul,
    sign_product,
    gated_input_grad,
    list_samples,
    gated_weight_grad,
    sample_engram,
    metaplastic_adam,
    unfold_bits,
    tap_sums,
    finish_pixels,
    fold_taps,
    add_padding,
    interleave_bits,
};

}  // namespace engram::cpu::ENGRAM_ISA
