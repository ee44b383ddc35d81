// The CPU kernels: one table of functions per instruction set. Kernels know no torch and no threads: each works on the
// part it is given, and launch.cpp shares the parts out. Arguments that are not in core/operands.h are made there.
#pragma once

#include <cstdint>

#include "core/compact.h"
#include "core/operands.h"
#include "cpu/planes.h"

namespace engram::cpu {

// Half-open, of rows unless a kernel says otherwise.
struct Range {
  int64_t begin, end;
};
// Of the rows and columns of a result.
struct Block {
  Range rows, columns;
};

struct PopcountRows {
  const uint64_t* bits;  // [rows, words]
  int64_t words;
  int32_t* counts;  // [rows]
};

struct TransposeBits {
  const uint64_t* bits;  // [rows, words_for(K)]
  int64_t rows, K;
  uint64_t* out;  // [K, words_for(rows)]
};

// y *= mask
struct ZeroUnrecruited {
  float* y;  // [rows, K]
  int64_t K;
  const uint64_t* mask;  // [rows or 1, words_for(K)]
  int64_t mask_stride;   // in words, 0 or words_for(K)
};

// Samples with their gates, for the panels of binary_matmul: tile by tile of Kernels::gated_tile samples, word by word,
// each sample's word and the parts into which its gate's is split. So a tile is read in one stream.
struct TileSamples {
  const uint64_t* x;     // [M, words]
  const uint64_t* gate;  // [M or 1, words]
  int64_t gate_stride, M, words;
  uint64_t* tiles;  // [M * words * (1 + Kernels::gate_parts)]
};

// x has padding 0 unless there is a gate, and the gate has.
struct PreparedMatmul : BinaryMatmul {
  const int32_t* recruited;  // [M or 1] popcount of each gate row; null without a gate
  const uint64_t* tiles;     // what tile_samples makes; null without a gate. Parts of the work begin with a tile
};

struct PreparedSigns : ValueSigns {
  const uint64_t* flip_bits;  // [words_for(N)], flip packed, or null
};

// y = (number times each factor in turn) scale[n] + shift[n], the last two rounded once, or without scale + shift[n]
struct ScaleValues {
  const int32_t* whole;  // [M, N] the numbers, or null
  const float* real;     // [M, N] the numbers where `whole` is null
  const float* factors;
  int64_t factor_count;
  const float* scale;  // [N] or null
  const float* shift;  // [N], null only without a scale
  int64_t M, N;
  float* y;  // [M, N]; the numbers themselves may lie there
};

// y[r,v] = sum_i a[r,i] s(plus[v,i]), or with minus sum_i a[r,i] (plus[v,i] - minus[v,i]).
struct StridedSignProduct {
  const void* a;    // a[r,i] lies at a[r * r_stride + i * i_stride]
  Element element;  // float32 or uint8
  int64_t r_stride, i_stride;
  const uint64_t* plus;   // [V, words]
  const uint64_t* minus;  // [V, words] or null
  int64_t words;
  void* y;  // y[r,v] lies at y[r * y_stride + v]; int32 for uint8
  int64_t y_stride;
  int64_t R, I, V;
};

struct GatedInputGrad {
  const float* d;        // [M, N]
  const uint64_t* w_t;   // [K, words_for(N)] transposed sign bits
  const uint64_t* mask;  // [M or 1, words_for(K)] units that take part
  int64_t mask_stride;   // in words, 0 or words_for(K)
  float* dx;             // [M, K]
  int64_t M, N, K;
};

// dw[n,k] = sum_m d[m,n] x[m,k], over samples in chunks of kSampleChunk
constexpr int64_t kSampleChunk = 128;
struct RealWeightGrad {
  const float* d;  // row m lies at d[m * d_stride]
  int64_t d_stride;
  const float* x;  // [M, K]
  int64_t M, K;
  float* dw;  // element (n, k) of a block lies at dw[(n - its first row) * dw_stride + k - its first column]
  int64_t dw_stride;
};

// Samples are taken in chunks of kSampleChunk, units by words. For each chunk and word, `lists` holds from its start on
// the samples of the chunk that recruited its units. How, and in which order, is between list_samples and
// gated_weight_grad: units with about as many samples follow each other in `order`, and `steps` says how many.
constexpr int64_t list_entries(int64_t recruited, int64_t samples) { return recruited + samples + kWordBits; }
struct GatedWeightGrad {
  const float* d;  // row m lies at d[m * d_stride]
  int64_t d_stride;
  const uint64_t* x;     // [M, words]
  const uint64_t* gate;  // [words] or [M, words]
  int64_t gate_stride;
  const int64_t* starts;  // [chunks, words], list_entries apart
  uint16_t* lists;
  uint8_t* order;  // [chunks, words, kWordBits]
  uint8_t* steps;  // likewise
  int64_t M, K, words;
  float* dw;  // element (n, k) of a block lies at dw[(n - its first row) * dw_stride + k - its first column]
  int64_t dw_stride;
};

// Samples are taken kPatchSamples at a time. The taps of each row of a filter are looked up in windows of kPatchTaps.
constexpr int64_t kPatchSamples = 32, kPatchTaps = 4, kPatchEntries = 1 << kPatchTaps;
// A filter that some units need at a place.
struct PatchFilter {
  int32_t filter, units;
};
struct PreparedPatches : PatchExcitability {
  int64_t windows;            // in a row
  const uint16_t* look_ups;   // [F, size, windows] where, in bytes from the tables of the row, the taps' entry begins:
                              // bit i of its number is 1 where tap i of the window is at least 0
  const int32_t* zero_begin;  // [F + 1] of each filter in zero_taps
  const int32_t* zero_taps;   // row * size + column of the taps that are 0
  // In the order of visits, by channel, column and row of the image: how many filters each place needs, which these
  // are, and the units of each of them.
  const int32_t* needed;
  const PatchFilter* visits;
  const int32_t* visited_units;
  char* scratch;  // of patch_scratch_bytes, for each share of the samples
};
constexpr int64_t patch_scratch_bytes(const PatchExcitability& p, int64_t windows) {
  const int64_t shorts = p.height * p.width * p.channels + p.size * windows * kPatchEntries;
  const int64_t words = 2 * p.height + p.N;
  return (2 * shorts + 4 * words) * kPatchSamples;
}

// sums[t,n] = sum_c s(W[n,t,c]), of rows of w without padding to 128 bits
struct TapSums {
  const uint64_t* w;  // [N, words]
  int64_t N, words;
  int64_t channels;
  int32_t* sums;  // [taps, N]
};

// y[m,n] = scale (sums[m,n] + sum over the taps t of m in the padding of tap_sums[t,n])
struct FinishPixels {
  Window window;
  int32_t* sums;  // [pixels of the range, N]; changed
  int64_t N;
  const int32_t* tap_sums;  // [taps, N] or null
  float scale;
  float* y;        // pixel m of all samples lies at y[m * y_stride]
  int32_t* whole;  // the same without the scale, instead of y, where it is not null; `sums` themselves may lie there
  int64_t y_stride;
};

// out[pixel, c] = the or of channel c of the pixels that an output pixel sees, other than flip_bits say
struct PoolBits {
  const uint64_t* bits;       // [samples, words_for(units)]
  Window window;              // of one group
  const uint64_t* flip_bits;  // [words_for(out_pixels * channels)] or null
  uint64_t* out;              // [samples, words_for(out_pixels * channels)]
};

// any = the channels that a pixel of a sample recruits; true if its pixels differ in that.
struct ChannelsOfPixels {
  const uint64_t* bits;  // [samples, stride], pixel by pixel
  int64_t stride, pixels, channels;
  uint64_t* any;  // [samples, ceil(channels / 64)]
};

// Of the outputs; pixels follow each other, or outputs do.
struct OutputGrad {
  const float* data;
  int64_t sample, pixel, output;  // strides
};
// Where the signs of a column lie, and the sums that its look-ups are added to.
struct SignColumn {
  int64_t signs, sums;
};

// Into some channels of a group of a sample.
struct Conv2dInputGrad {
  Window window;
  Planes planes;
  OutputGrad d;
  int64_t sample, group, outputs;  // outputs of the group
  const uint64_t* w_t;             // [channels of all groups' taps, words_for(outputs)]
  const uint64_t* any;             // channels that take part
  float scale;
  float* dx;            // of all samples
  float* gradient;      // scratch [outputs rounded up to fours, gradient_stride]
  float* sums;          // scratch [planes, channels, plane_stride]
  float* tile;          // scratch [taps * channels, kGradTile]
  SignColumn* columns;  // scratch [taps * channels]
  int64_t gradient_stride, plane_stride;
};

// planes_bits[plane, c] = the bits of channel c of the pixels of a plane (tap_plane), 0 outside the image
struct TapPlanes {
  const uint64_t* bits;  // [samples, stride]
  int64_t stride;
  Window window;
  Planes planes;
  uint64_t* planes_bits;  // [samples, planes.down * kernel_w, channels, words]
  int64_t words;
};

// sums[tile][t,c][n] of tiles of kGradTile outputs of a group, over some samples, kGradPixels pixels at a time.
constexpr int64_t kGradTile = 16, kGradPixels = 1024;
struct Conv2dWeightGrad {
  Window window;
  Planes planes;
  OutputGrad d;
  int64_t group, first, outputs;  // the first output, and how many
  const uint64_t* planes_bits;
  int64_t words;
  const uint64_t* channels;  // [samples or 1, ceil(channels / 64)] that take part, or null: all
  bool shared, pads;         // one row of channels for all samples; there is padding
  float* gradient;           // scratch [kGradPixels, kGradTile]
  float* padded;             // scratch [taps, kGradTile]
  int64_t* places;           // scratch [group_units]
  uint64_t* signs;           // scratch [kGradPixels / 64 or fewer, group_units]
  float* sums;               // [tiles, group_units, kGradTile]
};

// dw[n,k] = scale sum over the parts of the sums of its block, which are added to the first part
struct AddParts {
  float* sums;  // [groups, blocks, parts, stride]
  int64_t blocks, parts, stride, K, outputs;
  float scale;
  float* dw;  // [groups * outputs, K]
};

// How the moments are kept: core/compact.h.
enum class Moments { kFloat32, kBFloat16, kScaled };
struct MetaplasticAdam {
  void* weight;  // [N, K] float32 or bfloat16
  Element weight_element;
  const void* grad;      // element (n, k) lies at grad[(n - grad_row) * grad_stride + k - grad_unit]
  Element grad_element;  // float32, or bfloat16 like the weight
  int64_t grad_stride, grad_row, grad_unit;
  void* exp_avg;     // [N, K]
  void* exp_avg_sq;  // [N, K]
  Moments moments;
  float* exp_avg_scale;     // [N, ceil(K / kScaleBlock)] for kScaled
  float* exp_avg_sq_scale;  // likewise
  uint64_t* sign_bits;      // [N, words] or null
  int64_t N, K, words;
  float beta1, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, metaplasticity, step_size, weight_bound;
  RoundingKey rounding;  // of the draws that compact formats round with
  uint64_t first_row;    // number, for the draws, of row 0
  int64_t ahead;  // weights from those worked on to those that come to the cache meanwhile; 0: left to the machine
};

// The kernels: result, name, arguments, part of the work. A bool is true if there was a NaN: in x, in the score, or
// where a weight could not be updated; of channels_of_pixels if pixels differ. transpose_bits and list_samples work on
// words of units, tile_samples on tiles, metaplastic_adam on words of weights, row-major; tap_sums on taps,
// interleave_bits, pool_bits, channels_of_pixels, tap_planes and conv2d_weight_grad on samples, conv2d_input_grad on
// channels, add_parts on blocks, patch_excitability on kPatchSamples samples each; unfold_bits and finish_pixels on
// output pixels, of which the first of the range lies first in rows and sums.
#define ENGRAM_PREDICTION_KERNELS(KERNEL)               \
  KERNEL(bool, pack_signs, PackSigns, Range)            \
  KERNEL(void, pack_window, PackWindow, Range)          \
  KERNEL(void, unpack_signs, UnpackSigns, Range)        \
  KERNEL(void, popcount_rows, PopcountRows, Range)      \
  KERNEL(void, transpose_bits, TransposeBits, Range)    \
  KERNEL(void, tile_samples, TileSamples, Range)        \
  KERNEL(void, binary_matmul, PreparedMatmul, Block)    \
  KERNEL(void, sign_product, StridedSignProduct, Block) \
  KERNEL(bool, sample_engram, SampleEngram, Range)      \
  KERNEL(void, value_signs, PreparedSigns, Range)       \
  KERNEL(void, scale_values, ScaleValues, Range)        \
  KERNEL(void, top_units, TopUnits, Range)              \
  KERNEL(void, unfold_bits, UnfoldBits, Range)          \
  KERNEL(void, tap_sums, TapSums, Range)                \
  KERNEL(void, finish_pixels, FinishPixels, Range)      \
  KERNEL(void, pool_bits, PoolBits, Range)              \
  KERNEL(void, interleave_bits, InterleaveBits, Range)
// Those that the runtime (csrc/runtime) does without: gradients and the update.
#define ENGRAM_TRAINING_KERNELS(KERNEL)                     \
  KERNEL(void, standardise, Standardise, Range)             \
  KERNEL(void, standardise_grad, StandardiseGrad, Range)    \
  KERNEL(void, zero_unrecruited, ZeroUnrecruited, Range)    \
  KERNEL(void, gated_input_grad, GatedInputGrad, Range)     \
  KERNEL(void, list_samples, GatedWeightGrad, Range)        \
  KERNEL(void, gated_weight_grad, GatedWeightGrad, Block)   \
  KERNEL(void, real_weight_grad, RealWeightGrad, Block)     \
  KERNEL(bool, metaplastic_adam, MetaplasticAdam, Range)    \
  KERNEL(bool, channels_of_pixels, ChannelsOfPixels, Range) \
  KERNEL(void, conv2d_input_grad, Conv2dInputGrad, Range)   \
  KERNEL(void, tap_planes, TapPlanes, Range)                \
  KERNEL(void, conv2d_weight_grad, Conv2dWeightGrad, Range) \
  KERNEL(void, add_parts, AddParts, Range)                  \
  KERNEL(void, patch_excitability, PreparedPatches, Range)
#define ENGRAM_CPU_KERNELS(KERNEL)  \
  ENGRAM_PREDICTION_KERNELS(KERNEL) \
  ENGRAM_TRAINING_KERNELS(KERNEL)

struct Kernels {
  const char* isa;
  int64_t panel;                                          // rows of w that binary_matmul works on together
  int64_t gated_tile, gate_parts;                         // samples of a tile, words for each word of a gate there
  void (*grouped_product)(const GroupedProduct&, Block);  // null where sign_product is the faster
#define ENGRAM_POINTER(Result, name, Arguments, Part) Result (*name)(const Arguments&, Part);
  ENGRAM_CPU_KERNELS(ENGRAM_POINTER)
#undef ENGRAM_POINTER
};

}  // namespace engram::cpu
