// Declares this compilation's kernels; tables.cpp gathers them into the Kernels of the instruction set.
#pragma once

#include "cpu/kernels.h"

namespace engram::cpu::ENGRAM_ISA {

bool pack_signs(const void* x, Element element, int64_t k, uint64_t* bits, int64_t begin, int64_t end);
void pack_window(const float* x, float width, int64_t k, const uint64_t* gate, int64_t gate_stride, uint64_t* bits,
                 int64_t begin, int64_t end);
void unpack_signs(const uint64_t* bits, int64_t k, int size, uint64_t plus, uint64_t minus, void* out, int64_t begin,
                  int64_t end);
void popcount_rows(const uint64_t* bits, int64_t words, int32_t* out, int64_t begin, int64_t end);
void pack_reached(const int32_t* y, const int32_t* threshold, const uint8_t* flip, int64_t n, uint64_t* bits,
                  int64_t begin, int64_t end);
void transpose_bits(const uint64_t* bits, int64_t rows, int64_t k, uint64_t* out, int64_t begin, int64_t end);
void zero_unrecruited(float* y, int64_t k, const uint64_t* mask, int64_t mask_stride, int64_t begin, int64_t end);
void split_gates(const uint64_t* gate, uint64_t* parts, int64_t begin, int64_t end);
void binary_matmul(const BinaryMatmul& p, int64_t m_begin, int64_t m_end, int64_t n_begin, int64_t n_end);
void sign_product(const SignProduct& p, int64_t v_begin, int64_t v_end, int64_t r_begin, int64_t r_end);
void gated_input_grad(const GatedInputGrad& p, int64_t m_begin, int64_t m_end);
void list_samples(const GatedWeightGrad& p, int64_t word_begin, int64_t word_end);
void gated_weight_grad(const GatedWeightGrad& p, int64_t n_begin, int64_t n_end, int64_t k_begin, int64_t k_end,
                       float* dw, int64_t dw_stride);
bool sample_engram(const SampleEngram& p, uint32_t* keys, int64_t m_begin, int64_t m_end);
bool metaplastic_adam(const MetaplasticAdam& p, int64_t begin, int64_t end);
void unfold_bits(const Window& w, const uint64_t* bits, int64_t stride, int64_t group, uint64_t* rows,
                 int64_t row_words, int64_t begin, int64_t end);
void tap_sums(const uint64_t* w_bits, int64_t n, int64_t words, int64_t taps, int64_t channels, int32_t* sums);
void finish_pixels(const Window& w, int32_t* sums, int64_t n, const int32_t* tap_sums, float scale, float* y,
                   int64_t y_stride, int64_t begin, int64_t end);
void fold_taps(const Window& w, const float* z, int64_t channels, float scale, float* dx, int64_t begin, int64_t end);
void add_padding(const Window& w, const float* d, int64_t stride, int64_t n, int64_t samples, int64_t tap,
                 float* padded);
void interleave_bits(const uint64_t* bits, int64_t rows, int64_t k, uint64_t* out, int64_t begin, int64_t end);

}  // namespace engram::cpu::ENGRAM_ISA
