// The backend: each operator on plain pointers, its work shared out among threads and run by the kernels of
// the active instruction set. Knows no torch; threads and workspace come through Runtime.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace engram::cpu {

struct Runtime {
  using Body = void (*)(int64_t begin, int64_t end, void* context);
  // Calls body on disjoint ranges that cover [0, count), each of at least `grain` where possible.
  void (*parallel_for)(int64_t count, int64_t grain, Body body, void* context);
  // Memory that lives until the operator returns.
  void* (*allocate)(void* owner, size_t bytes);
  void* owner;
  int threads;
};

// Name of the instruction set in use, and of those that this build has and this machine can run, best first.
const char* isa();
std::vector<std::string> available_isas();
// False if `name` is not available.
bool set_isa(const std::string& name);

// True if a NaN was seen.
bool pack_signs(const Runtime&, const PackSigns&);
void pack_window(const Runtime&, const PackWindow&);
void unpack_signs(const Runtime&, const UnpackSigns&);
void transpose_bits(const Runtime&, const TransposeBits&);
void binary_matmul(const Runtime&, const BinaryMatmul&);
// Any of the operators of core/operands.h, on float32 or uint8.
void sign_product(const Runtime&, const SignProduct&);
// `signs` are those of the groups: [N, words_for(K)].
void grouped_product(const Runtime&, const GroupedProduct&, const uint64_t* signs);
void value_signs(const Runtime&, const ValueSigns&);
void prepared_signs(const Runtime&, const PreparedSigns&);  // the same with flips packed
void scale_values(const Runtime&, const ScaleValues&);
void top_units(const Runtime&, const TopUnits&);
void standardise(const Runtime&, const Standardise&);
void standardise_grad(const Runtime&, const StandardiseGrad&);
void patch_excitability(const Runtime&, const PatchExcitability&);
bool sample_engram(const Runtime&, SampleEngram);  // keys are made here
void unfold_bits(const Runtime&, const UnfoldBits&);
void interleave_bits(const Runtime&, const InterleaveBits&);
void binary_conv2d(const Runtime&, const BinaryConv2d&);
void pool_bits(const Runtime&, const PoolBits&, int64_t samples);
void masked_conv2d_input_grad(const Runtime&, const MaskedConv2dInputGrad&);
void gated_conv2d_weight_grad(const Runtime&, const GatedConv2dWeightGrad&);
// True if a weight could not be updated.
bool metaplastic_adam(const Runtime&, const MetaplasticAdam&);
// The same with the gradient that the product of gated_weight_grad would give, made and consumed block by block; its y
// and p.grad are not used.
bool gated_metaplastic_adam(const Runtime&, const SignProduct& gradient, const MetaplasticAdam& p);

}  // namespace engram::cpu
