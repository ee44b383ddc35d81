// The CPU kernels: one table of functions per instruction set. Kernels know no torch and no threads: each works on the
// half-open range it is given, and launch.cpp shares the ranges out.
#pragma once

#include <cstdint>

#include "core/window.h"

namespace engram::cpu {

// Element types that pack_signs reads.
enum class Element { kFloat32, kBFloat16, kFloat16 };

// gate_stride is in words: 0 for one gate shared by all samples, `words` for one gate per sample.
struct BinaryMatmul {
  const uint64_t* x;     // [M, words], without a gate with padding 0
  const uint64_t* w;     // [N, words]
  const uint64_t* gate;  // [words] or [M, words], padding 0; null: every unit recruited
  int64_t gate_stride;
  const int32_t* recruited;  // [M or 1] popcount of each gate row; null without a gate
  int32_t* y;                // [M, N]
  int64_t M, N, K, words;
  const uint64_t* gate_parts;  // what split_gates makes of the gate; the gate itself where Kernels::gate_parts is 1
};

// y[v,r] = sum_i s(plus[r,i]) D[i,v], or with minus sum_i (plus[r,i] - minus[r,i]) D[i,v].
struct SignProduct {
  const void* d;  // D[i,v] lies at d[i * i_stride + v * v_stride]; float, or uint8 where `exact`
  int64_t i_stride, v_stride;
  const uint64_t* plus;   // [R, words]
  const uint64_t* minus;  // [R, words] or null
  int64_t words;
  void* y;  // y[v,r] lies at y[v * y_stride + r]; float, or int32 where `exact`
  int64_t y_stride;
  int64_t I, V, R;
  bool exact;
};

struct GatedInputGrad {
  const float* d;        // [M, N]
  const uint64_t* w_t;   // [K, words_for(N)] transposed sign bits
  const uint64_t* mask;  // [M or 1, words_for(K)] units that take part
  int64_t mask_stride;   // in words, 0 or words_for(K)
  float* dx;             // [M, K]
  int64_t M, N, K;
};

// Samples are taken in chunks of kSampleChunk. For each chunk and unit, `lists` holds the samples of the chunk that
// recruited the unit, each as 2 * (its place in the chunk) + 1{its sign is -1}.
constexpr int64_t kSampleChunk = 128;
struct GatedWeightGrad {
  const float* d;        // [M, N]
  const uint64_t* x;     // [M, words]
  const uint64_t* gate;  // as in BinaryMatmul, never null
  int64_t gate_stride;
  int64_t capacity;  // entries kept for a unit: the lesser of M and kSampleChunk
  uint8_t* lists;    // [chunks, K, capacity]
  int32_t* counts;   // [chunks, K]
  int64_t M, N, K, words;
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
  uint64_t first_row;
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
  uint64_t seed;  // of the draws that compact formats round with
  uint32_t offset;
  uint64_t first_row;  // number, for the draws, of row 0
  int64_t ahead;       // weights from those worked on to those that come to the cache meanwhile; 0: left to the machine
};

struct Kernels {
  const char* isa;
  int64_t panel;       // rows of w that binary_matmul works on together
  int64_t gate_parts;  // words into which it wants each word of a gate split

  // Packs rows [begin, end) of x [.., k]; true if a NaN was seen.
  bool (*pack_signs)(const void* x, Element element, int64_t k, uint64_t* bits, int64_t begin, int64_t end);
  // bits = 1{|x| <= width} & gate; gate may be null.
  void (*pack_window)(const float* x, float width, int64_t k, const uint64_t* gate, int64_t gate_stride, uint64_t* bits,
                      int64_t begin, int64_t end);
  // Writes the bit pattern `plus` or `minus` of `size` bytes (1, 2, 4, 8) for each unit of rows [begin, end).
  void (*unpack_signs)(const uint64_t* bits, int64_t k, int size, uint64_t plus, uint64_t minus, void* out,
                       int64_t begin, int64_t end);
  // out[row] = popcount of the row.
  void (*popcount_rows)(const uint64_t* bits, int64_t words, int32_t* out, int64_t begin, int64_t end);
  // Packs 1{(y >= threshold) != flip} of rows [begin, end) of y [.., n]; thresholds and flips are of columns.
  void (*pack_reached)(const int32_t* y, const int32_t* threshold, const uint8_t* flip, int64_t n, uint64_t* bits,
                       int64_t begin, int64_t end);
  // Transposes rows of k bits into k rows of words_for(rows) words; range in blocks of 64 units.
  void (*transpose_bits)(const uint64_t* bits, int64_t rows, int64_t k, uint64_t* out, int64_t begin, int64_t end);
  // y *= mask, rows [begin, end).
  void (*zero_unrecruited)(float* y, int64_t k, const uint64_t* mask, int64_t mask_stride, int64_t begin, int64_t end);

  void (*split_gates)(const uint64_t* gate, uint64_t* parts, int64_t begin, int64_t end);
  void (*binary_matmul)(const BinaryMatmul&, int64_t m_begin, int64_t m_end, int64_t n_begin, int64_t n_end);
  void (*sign_product)(const SignProduct&, int64_t v_begin, int64_t v_end, int64_t r_begin, int64_t r_end);
  void (*gated_input_grad)(const GatedInputGrad&, int64_t m_begin, int64_t m_end);
  void (*list_samples)(const GatedWeightGrad&, int64_t word_begin, int64_t word_end);
  // Element (n, k) of the gradient goes to dw[(n - n_begin) * dw_stride + k - k_begin].
  void (*gated_weight_grad)(const GatedWeightGrad&, int64_t n_begin, int64_t n_end, int64_t k_begin, int64_t k_end,
                            float* dw, int64_t dw_stride);
  // `keys` is scratch of K words; true if a NaN score was seen.
  bool (*sample_engram)(const SampleEngram&, uint32_t* keys, int64_t m_begin, int64_t m_end);
  // Range in words of weights, row-major; true if a weight could not be updated.
  bool (*metaplastic_adam)(const MetaplasticAdam&, int64_t begin, int64_t end);

  // Writes the taps of output pixels [begin, end) of all samples, row_words apart and 0 behind their last. Samples of
  // bits lie `stride` words apart; 0: one serves all.
  void (*unfold_bits)(const Window&, const uint64_t* bits, int64_t stride, int64_t group, uint64_t* rows,
                      int64_t row_words, int64_t begin, int64_t end);
  // sums[t,n] of n rows of w, `words` apart, that hold the channels of each tap.
  void (*tap_sums)(const uint64_t* w_bits, int64_t n, int64_t words, int64_t taps, int64_t channels, int32_t* sums);
  // Pixels [begin, end) of all samples; sums [end - begin, n] are changed, pixel m goes to y[m * y_stride ..]. tap_sums
  // may be null.
  void (*finish_pixels)(const Window&, int32_t* sums, int64_t n, const int32_t* tap_sums, float scale, float* y,
                        int64_t y_stride, int64_t begin, int64_t end);
  // Adds to some channels of dx, the image of one sample, scale times the terms z [end - begin, taps, channels] of its
  // pixels.
  void (*fold_taps)(const Window&, const float* z, int64_t channels, float scale, float* dx, int64_t begin,
                    int64_t end);
  // padded[n] = the sum of d, whose pixels [samples, out pixels] lie `stride` floats apart, where the tap is padding.
  void (*add_padding)(const Window&, const float* d, int64_t stride, int64_t n, int64_t samples, int64_t tap,
                      float* padded);
  // Samples [begin, end), each `rows` rows of k bits.
  void (*interleave_bits)(const uint64_t* bits, int64_t rows, int64_t k, uint64_t* out, int64_t begin, int64_t end);
};

}  // namespace engram::cpu
