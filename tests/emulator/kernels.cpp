// Launches the kernels of csrc/cuda on the emulator: one function an operator, for tests/emulator/operators.py.
#include "cuda/binary_dot.cuh"
#include "cuda/binary_matmul.cuh"
#include "cuda/pack.cuh"
#include "cuda/sample_engram.cuh"
#include "cuda/sign_product.cuh"
#include "cuda/standardise.cuh"
#include "cuda/unfold.cuh"
#include "cuda/unpack.cuh"
#include "cuda/valid_gate.cuh"

using namespace engram;
using namespace engram::cuda;

#define ENGRAM_EXPORT extern "C" __attribute__((visibility("default"))) int

ENGRAM_EXPORT run_pack_signs(const void* x, int64_t element, int64_t rows, int64_t k, uint64_t* bits, int32_t* nan) {
  return pack_signs({x, static_cast<Element>(element), rows, k, words_for(k), bits, nan}, nullptr);
}

ENGRAM_EXPORT run_pack_window(const float* x, float width, const uint64_t* gate, int64_t gate_stride, int64_t rows,
                              int64_t k, uint64_t* bits) {
  return pack_window({x, width, gate, gate_stride, rows, k, words_for(k), bits}, nullptr);
}

ENGRAM_EXPORT run_unpack_signs(const uint64_t* bits, int64_t rows, int64_t k, int64_t size, int64_t plus, int64_t minus,
                               void* out) {
  return unpack_signs({bits, rows, k, words_for(k), static_cast<int>(size), static_cast<uint64_t>(plus),
                       static_cast<uint64_t>(minus), out},
                      nullptr);
}

ENGRAM_EXPORT run_unfold_bits(const uint64_t* bits, int64_t samples, const int64_t* window, int64_t group,
                              uint64_t* rows) {
  static_assert(sizeof(engram::Window) == 14 * sizeof(int64_t));
  UnfoldBits p{bits, samples, 0, {}, group, rows, 0};
  memcpy(&p.window, window, sizeof p.window);
  p.stride = words_for(engram::units(p.window));
  p.words = words_for(group_units(p.window));
  return unfold_bits(p, nullptr);
}

ENGRAM_EXPORT run_valid_gate(const uint64_t* gate, int64_t rows, int64_t k, uint64_t* out) {
  return valid_gate({gate, rows, k, words_for(k), out}, nullptr);
}

// form: 0 as the launcher chooses, 1 by tiles, 2 by dots. y or y_bits is null.
ENGRAM_EXPORT run_binary_matmul(int64_t form, const uint64_t* x, const uint64_t* w, const uint64_t* gate,
                                int64_t gate_stride, int64_t m, int64_t n, int64_t k, int32_t* y,
                                const int32_t* threshold, const uint8_t* flip, uint64_t* y_bits) {
  const BinaryMatmul p{x, w, gate, gate_stride, m, n, k, words_for(k), y, threshold, flip, y_bits};
  if (form == 1) return binary_matmul_tiles(p, nullptr);
  if (form == 2) return binary_matmul_dots(p, nullptr);
  return binary_matmul(p, nullptr);
}

ENGRAM_EXPORT run_sign_product(const void* a, int64_t element, int64_t a_transposed, const uint64_t* signs,
                               int64_t signs_by_row, const uint64_t* gate, int64_t gate_stride, const uint64_t* mask,
                               int64_t mask_stride, void* y, int64_t r, int64_t i, int64_t v) {
  return sign_product({a, static_cast<Element>(element), a_transposed != 0, signs, signs_by_row != 0, gate, gate_stride,
                       mask, mask_stride, y, r, i, v},
                      nullptr);
}

ENGRAM_EXPORT run_sample_engram(const float* score, uint64_t* gate, int64_t m, int64_t k, int64_t bernoulli,
                                int64_t count, int64_t threshold, float inverse_temperature, int64_t seed,
                                int64_t offset, int64_t first_row, int64_t row_step, uint32_t* keys, int64_t key_stride,
                                int32_t* nan) {
  return sample_engram({score, gate, m, k, words_for(k), bernoulli != 0, count, static_cast<uint64_t>(threshold),
                        inverse_temperature, static_cast<uint64_t>(seed), static_cast<uint32_t>(offset),
                        static_cast<uint64_t>(first_row), static_cast<uint64_t>(row_step), keys, key_stride, nan},
                       nullptr);
}

ENGRAM_EXPORT run_standardise(const float* y, float eps, int64_t m, int64_t n, float* z, double* moments) {
  return standardise({y, eps, m, n, z, moments}, nullptr);
}

ENGRAM_EXPORT run_standardise_grad(const float* d, const float* y, const double* moments, int64_t m, int64_t n,
                                   float* dy) {
  return standardise_grad({d, y, moments, m, n, dy}, nullptr);
}
