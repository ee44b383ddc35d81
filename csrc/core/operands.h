// Arguments of the operators, as the CPU and CUDA take them. Tensors are contiguous and of one device; on CUDA packed
// rows are 16-byte aligned (bits.h).
//
// M samples, N outputs, K inputs, words = words_for(K). A gate_stride is in words: 0 for one gate shared by all
// samples, `words` for one gate per sample. Where `nan` is given, a CUDA kernel that meets a NaN writes 1 there, in
// host memory that the device sees; the CPU says so by what it returns.
#pragma once

#include <cstdint>

#include "core/window.h"

namespace engram {

// Numbers that kernels read.
enum class Element { kFloat32, kBFloat16, kFloat16, kUint8 };

struct PackSigns {
  const void* x;  // [rows, K] float32, bfloat16 or float16
  Element element;
  int64_t rows, K, words;
  uint64_t* bits;  // [rows, words]
  int32_t* nan;
};

struct PackWindow {
  const float* x;  // [rows, K]
  float width;
  const uint64_t* gate;  // null: every unit
  int64_t gate_stride;
  int64_t rows, K, words;
  uint64_t* bits;  // [rows, words]
};

struct UnpackSigns {
  const uint64_t* bits;  // [rows, words]
  int64_t rows, K, words;
  int size;              // bytes of an element: 1, 2, 4 or 8
  uint64_t plus, minus;  // bit patterns of +1 and -1
  void* out;             // [rows, K]
};

// y[m,n] = sum_k g[m,k] s(x[m,k]) s(w[n,k])
struct BinaryMatmul {
  const uint64_t* x;     // [M, words]
  const uint64_t* w;     // [N, words]
  const uint64_t* gate;  // [words] or [M, words], null: every unit recruited
  int64_t gate_stride;
  int64_t M, N, K, words;
  int32_t* y;  // [M, N]; null for binary_threshold
  // binary_threshold: bit n of row m is (y[m,n] >= threshold[n]) != flip[n]
  const int32_t* threshold;  // [N]
  const uint8_t* flip;       // [N], 0 or 1
  uint64_t* y_bits;          // [M, words_for(N)]; null for binary_matmul
};

// y[r,v] = mask[r,v] sum_i a[r,i] s[i,v], with s in {-1, 0, 1} from packed signs and a gate.
//
//   operator            a               signs, bit 1 = +1             y
//   sign_matmul_t       x [M, K]        w [N, words], along i         [M, N]; x may be uint8: exact, y int32
//   sign_matmul         a [M, N]        w [N, words], along v         [M, K]
//   masked_input_grad   d [M, N]        w [N, words], along v         [M, K], mask [M or 1, words]
//   gated_weight_grad   d [M, N]^T      x [M, words], along v, gate   [N, K]; s is 0 where the gate is
struct SignProduct {
  const void* a;  // [R, I], or with a_transposed [I, R]
  Element element;
  bool a_transposed;
  const uint64_t* signs;  // [V, words_for(I)], or with signs_by_row [I, words_for(V)]
  bool signs_by_row;
  const uint64_t* gate;  // by row like signs, or null; s is 0 where the gate is
  int64_t gate_stride;
  const uint64_t* mask;  // [R or 1, words_for(V)] or null
  int64_t mask_stride;
  void* y;  // [R, V] of the element of a; int32 for uint8
  int64_t R, I, V;
};

// y[m,n] = sum_k x[m,k] s(w[n,k]), from the signs in groups of kGroup inputs
struct GroupedProduct {
  const uint8_t* x;  // [M, K]
  const uint16_t*
      groups;      // [ceil(K / kGroup), stride]: bit place_in_group(i) of number n of row g is w[n, kGroup g + i]
  int64_t stride;  // N rounded up to kGroupedRows
  int32_t* y;      // [M, N]
  int64_t M, N, K;
};

// bits[m,n] = (y[m,n] >= threshold[n]) != flip[n]; without thresholds y[m,n] >= mean of row m
struct ValueSigns {
  const int32_t* y;          // [M, N]
  const int32_t* threshold;  // [N] or null
  const uint8_t* flip;       // [N], 0 or 1, or null
  int64_t M, N;
  uint64_t* bits;  // [M, words_for(N)]
};

// The `count` units of largest y of each row, equal ones by the lower number first.
struct TopUnits {
  const int32_t* y;  // [M, K]
  int64_t M, K, count;
  uint64_t* gate;  // [M, words_for(K)]
};

// z[m,n] = max over the pool x pool places from that of unit n on of
//          sum_ij w[f,i,j] x[m,r+i,c+j,channel] / (sqrt(sum over the patch of (x - mean)^2) + floor)
// with unit numbers ((row * columns + column) * channels + channel) * F + f, of rows = height - size - pool + 2 and
// columns likewise.
struct PatchExcitability {
  const uint8_t* images;  // [M, height, width, channels]
  int64_t M, height, width, channels;
  const int8_t* filters;  // [F, size, size] of -1, 0, 1
  int64_t F, size;        // size up to 128
  const int64_t* units;   // [N], rising
  int64_t N;
  int64_t pool;
  float floor;  // above 0
  float* z;     // [M, N]
};

// Of a convolution, whose taps window.h places: M = samples * out_pixels rows, K = group_units.
struct UnfoldBits {
  const uint64_t* bits;  // [samples, words_for(units)]
  int64_t samples;
  int64_t stride;  // of a sample, in words; 0: one serves all
  Window window;
  int64_t group;
  uint64_t* rows;  // [M, words] of the channels of the group
  int64_t words;
};

struct InterleaveBits {
  const uint64_t* bits;  // [samples * rows, words_for(K)]
  int64_t samples, rows, K;
  uint64_t* out;  // [samples, words_for(rows * K)]
};

struct BinaryConv2d {
  const uint64_t* x;     // [samples, words_for(units)]
  const uint64_t* w;     // [outputs, words_for(K)]
  const uint64_t* gate;  // like x, or one row; null: every unit recruited
  int64_t gate_stride;
  Window window;
  int64_t samples, outputs;
  float scale;
  float* y;       // [M, outputs]
  int32_t* sums;  // [M, outputs], where the sums themselves go instead; null for y
};

struct MaskedConv2dInputGrad {
  const float* d;        // [M, outputs], or of each sample [outputs, out_pixels]
  bool outputs_first;    // the latter
  const uint64_t* w;     // [outputs, words_for(K)]
  const uint64_t* mask;  // [samples or 1, words_for(units)]
  int64_t mask_stride;
  Window window;
  int64_t samples, outputs;
  float scale;
  float* dx;  // [samples, units]
};

struct GatedConv2dWeightGrad {
  const float* d;  // as in MaskedConv2dInputGrad
  bool outputs_first;
  const uint64_t* x;  // as in BinaryConv2d
  const uint64_t* gate;
  int64_t gate_stride;
  Window window;
  int64_t samples, outputs;
  float scale;
  float* dw;  // [outputs, K]
};

// Partial sums of a mean, whose order `_mean_in_order` of reference.py states: the same for every backend.
constexpr int kPartialSums = 32;

// z[m,n] = (y[m,n] - mean[m]) * reciprocal[m]
struct Standardise {
  const float* y;  // [M, N]
  double eps;
  int64_t M, N;
  float* z;         // [M, N]
  double* moments;  // [M, 2]: the mean, and 1 / sqrt(variance + eps) rounded to float32
};

// dy[m,n] = (d[m,n] - mean(d[m]) - z[m,n] mean(d[m] z[m])) * reciprocal[m]
struct StandardiseGrad {
  const float* d;  // [M, N]
  const float* y;
  const double* moments;
  int64_t M, N;
  float* dy;
};

struct SampleEngram {
  const float* score;  // [M, K]
  uint64_t* gate;      // [M, words]
  int64_t M, K, words;
  bool bernoulli;
  int64_t count;              // recruited units per sample (Gumbel-top-k)
  uint64_t threshold;         // recruited where the 32-bit draw is below it (Bernoulli)
  float inverse_temperature;  // 0: scores ignored; negative: no noise
  uint64_t seed;
  uint32_t offset;
  uint64_t first_row, row_step;  // sample m has the draws of row first_row + m row_step
  uint32_t*
      keys;  // scratch for Gumbel-top-k: [M, key_stride] on CUDA, 64 words(K) on the CPU, for each share of the samples
  int64_t key_stride;  // K rounded up to a multiple of 4
  int32_t* nan;
};

}  // namespace engram
