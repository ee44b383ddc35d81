// The CPU kernels: one table of functions per instruction set. Kernels know no torch and no threads: each works on the
// half-open range it is given, and launch.cpp shares the ranges out.
#pragma once

#include <cstdint>

namespace engram::cpu {

// Element types that pack_signs reads.
enum class Element { kFloat32, kBFloat16, kFloat16 };

// gate_stride is in words: 0 for one gate shared by all samples, `words` for one gate per sample.
struct BinaryMatmul {
  const uint64_t* x;     // [M, words]
  const uint64_t* w;     // [N, words]
  const uint64_t* gate;  // [words] or [M, words], null: every unit recruited
  int64_t gate_stride;
  const int32_t* recruited;  // [M or 1] popcount of each gate row; null without a gate
  int32_t* y;                // [M, N]
  int64_t M, N, K, words;
};

struct SignMatmul {
  const float* a;      // sign_matmul: [M, N]; sign_matmul_t: [M, K]
  const float* a_sum;  // [M] sum of each row of a
  const uint64_t* w;   // [N, words]
  float* y;            // sign_matmul: [M, K]; sign_matmul_t: [M, N]
  int64_t M, N, K, words;
};

struct GatedInputGrad {
  const float* d;        // [M, N]
  const float* d_sum;    // [M] sum of each row of d
  const uint64_t* w_t;   // [K, words_for(N)] transposed sign bits
  const uint64_t* mask;  // [M or 1, words_for(K)] units that take part
  int64_t mask_stride;   // in words, 0 or words_for(K)
  float* dx;             // [M, K]
  int64_t M, N, K;
};

// Samples are taken in chunks of at most kSampleChunk; `lists` holds, for each unit, the samples of the chunk that
// recruited it: those with sign +1 from the front, those with sign -1 from the back.
constexpr int64_t kSampleChunk = 256;
struct GatedWeightGrad {
  const float* d;        // [M, N]
  const uint64_t* x;     // [M, words]
  const uint64_t* gate;  // as in BinaryMatmul
  int64_t gate_stride;
  uint8_t* lists;   // [K, kSampleChunk]
  int32_t* counts;  // [K, 2] number of +1 and of -1 samples
  float* dw;        // [N, K]
  int64_t M, N, K, words;
  int64_t chunk_begin, chunk_end;  // samples of this chunk; the first chunk overwrites dw, later ones add
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

struct MetaplasticAdam {
  float* weight;        // [N, K]
  const float* grad;    // [N, K]
  float* exp_avg;       // [N, K]
  float* exp_avg_sq;    // [N, K]
  uint64_t* sign_bits;  // [N, words] or null
  int64_t N, K, words;
  float beta1, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, metaplasticity, step_size;
};

struct Kernels {
  const char* isa;
  int64_t panel;  // rows of w that binary_matmul works on together

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
  // Transposes rows of k bits into k rows of words_for(rows) words; range in blocks of 64 units.
  void (*transpose_bits)(const uint64_t* bits, int64_t rows, int64_t k, uint64_t* out, int64_t begin, int64_t end);
  // out[row] = sum of a row of k floats.
  void (*sum_rows)(const float* a, int64_t k, float* out, int64_t begin, int64_t end);
  // y *= mask, rows [begin, end).
  void (*zero_unrecruited)(float* y, int64_t k, const uint64_t* mask, int64_t mask_stride, int64_t begin, int64_t end);

  void (*binary_matmul)(const BinaryMatmul&, int64_t m_begin, int64_t m_end, int64_t n_begin, int64_t n_end);
  void (*sign_matmul)(const SignMatmul&, int64_t m_begin, int64_t m_end, int64_t word_begin, int64_t word_end);
  void (*sign_matmul_t)(const SignMatmul&, int64_t m_begin, int64_t m_end, int64_t n_begin, int64_t n_end);
  void (*gated_input_grad)(const GatedInputGrad&, int64_t m_begin, int64_t m_end);
  void (*list_samples)(const GatedWeightGrad&, int64_t word_begin, int64_t word_end);
  void (*gated_weight_grad)(const GatedWeightGrad&, int64_t n_begin, int64_t n_end);
  // `keys` is scratch of K words; true if a NaN score was seen.
  bool (*sample_engram)(const SampleEngram&, uint32_t* keys, int64_t m_begin, int64_t m_end);
  // Range in words of weights, row-major; true if a weight became NaN.
  bool (*metaplastic_adam)(const MetaplasticAdam&, int64_t begin, int64_t end);
};

}  // namespace engram::cpu
