// What bindings.cpp calls: each operator on plain pointers, its work shared out among threads and run by the kernels of
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

struct WeightGradOperands {
  const float* d;        // [M, N]
  const uint64_t* x;     // [M, words]
  const uint64_t* gate;  // as in BinaryMatmul
  int64_t gate_stride;
  int64_t M, N, K;
};

// Name of the instruction set in use, and of those that this build has and this machine can run, best first.
const char* isa();
std::vector<std::string> available_isas();
// False if `name` is not available.
bool set_isa(const std::string& name);

// True if a NaN was seen.
bool pack_signs(const Runtime&, const void* x, Element element, int64_t rows, int64_t k, uint64_t* bits);
void pack_window(const Runtime&, const float* x, float width, int64_t rows, int64_t k, const uint64_t* gate,
                 int64_t gate_stride, uint64_t* bits);
void unpack_signs(const Runtime&, const uint64_t* bits, int64_t rows, int64_t k, int size, uint64_t plus,
                  uint64_t minus, void* out);
// bits [rows, words of k] -> out [k, words of rows].
void transpose_bits(const Runtime&, const uint64_t* bits, int64_t rows, int64_t k, uint64_t* out);
void binary_matmul(const Runtime&, BinaryMatmul p);  // fills p.recruited itself
// bits [M, words_for(N)] of 1{(y >= threshold[n]) != flip[n]}; p.y is not used.
void binary_threshold(const Runtime&, const BinaryMatmul& p, const int32_t* threshold, const uint8_t* flip,
                      uint64_t* bits);
// a [M, N], w [N, words], y [M, K].
void sign_matmul(const Runtime&, const float* a, const uint64_t* w, float* y, int64_t M, int64_t N, int64_t K);
// x [M, K], w [N, words], y [M, N]; x and y float, or uint8 and int32 where `exact`.
void sign_matmul_t(const Runtime&, const void* x, bool exact, const uint64_t* w, void* y, int64_t M, int64_t N,
                   int64_t K);
void masked_input_grad(const Runtime&, const float* d, const uint64_t* w, const uint64_t* mask, int64_t mask_stride,
                       float* dx, int64_t M, int64_t N, int64_t K);
// dw [N, K].
void gated_weight_grad(const Runtime&, const WeightGradOperands& p, float* dw);
bool sample_engram(const Runtime&, const SampleEngram& p);

// Convolutions (core/window.h): M = samples * out_pixels rows, K = group_units.
struct BinaryConvolution {
  const uint64_t* x;     // [samples, words_for(units)]
  const uint64_t* w;     // [outputs, words_for(K)]
  const uint64_t* gate;  // like x, or one row, or null
  int64_t gate_stride;
  float* y;  // [M, outputs]
  int64_t samples, outputs;
  float scale;
};
// rows [M, words_for(K)] of the channels of a group.
void unfold_bits(const Runtime&, const Window& window, const uint64_t* bits, int64_t samples, int64_t group,
                 uint64_t* rows);
void binary_conv2d(const Runtime&, const Window& window, const BinaryConvolution& p);
// d [M, outputs], mask [samples or 1, words_for(units)], dx [samples, units].
void masked_conv2d_input_grad(const Runtime&, const Window& window, const float* d, const uint64_t* w,
                              const uint64_t* mask, int64_t mask_stride, float scale, float* dx, int64_t samples,
                              int64_t outputs);
// d [M, outputs], x and gate as in BinaryConvolution, dw [outputs, K].
void gated_conv2d_weight_grad(const Runtime&, const Window& window, const float* d, const uint64_t* x,
                              const uint64_t* gate, int64_t gate_stride, float scale, float* dw, int64_t samples,
                              int64_t outputs);
// bits [samples * rows, words_for(k)] -> out [samples, words_for(rows * k)].
void interleave_bits(const Runtime&, const uint64_t* bits, int64_t samples, int64_t rows, int64_t k, uint64_t* out);
// True if a weight could not be updated.
bool metaplastic_adam(const Runtime&, const MetaplasticAdam& p);
// The same with the gradient that gated_weight_grad would give, made and consumed block by block; p.grad is not read.
bool gated_metaplastic_adam(const Runtime&, const WeightGradOperands& gradient, const MetaplasticAdam& p);

}  // namespace engram::cpu
