// metaplastic_adam_: moments, consolidation, hidden weight and fresh sign bits in one pass over memory.
//
//   g   = grad + weight_decay * W
//   mu  = beta1 mu + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
//   mu' = mu (1 - tanh^2(m |W|))  if the step would shrink |W|, that is W mu > 0;  else mu
//   W  -= step_size * mu' / (sqrt(v) + eps),   step_size = lr sqrt(1 - beta2^t) / (1 - beta1^t)
//
// (Laborieux et al. 2021, eq. 2 and their published optimizer, which tests the sign of the momentum.)
// 1 - tanh^2(z) = 4 e^{-2z} / (1 + e^{-2z})^2. All tensors [N, K] float32; range in words of 64 weights.
// Bound by memory: 4 reads and 3 writes of 4 bytes a weight, and one bit. Only single IEEE operations and no fused
// multiply-add, so that every instruction set computes the same bits.
#include "core/philox.h"
#include "cpu/simd.h"
#include "cpu/tables.h"

namespace engram::cpu::ENGRAM_ISA {

namespace {

// e^x for x <= 0, relative error below 3e-7; below -87 the result is e^-87.
ENGRAM_INLINE float exp_of_negative(float x) {
  x = x > -87.0f ? x : -87.0f;
  const float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: rounds to the nearest integer
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;    // ln 2 in two parts (Cody and Waite)
  float p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * float_from_bits(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
}

// The update of n <= 64 weights, written to be vectorised; true if one became NaN.
ENGRAM_INLINE bool update(const MetaplasticAdam& p, int64_t n, float* __restrict w, const float* __restrict grad,
                          float* __restrict exp_avg, float* __restrict exp_avg_sq) {
  const float keep1 = p.beta1, take1 = p.one_minus_beta1, keep2 = p.beta2, take2 = p.one_minus_beta2;
  const float slope = -2.0f * p.metaplasticity;
  uint32_t nan = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float weight = w[i];
    const float g = grad[i] + p.weight_decay * weight;
    const float mu = keep1 * exp_avg[i] + take1 * g;
    const float v = keep2 * exp_avg_sq[i] + take2 * (g * g);
    exp_avg[i] = mu;
    exp_avg_sq[i] = v;
    const float t = exp_of_negative(slope * __builtin_fabsf(weight));
    const float consolidated = mu * (4.0f * t / ((1.0f + t) * (1.0f + t)));
    // W mu > 0 by signs, since the product of two tiny numbers underflows to 0
    const bool opposed = ((weight > 0.0f) & (mu > 0.0f)) | ((weight < 0.0f) & (mu < 0.0f));
    const float next = weight - p.step_size * ((opposed ? consolidated : mu) / (__builtin_sqrtf(v) + p.eps));
    w[i] = next;
    nan |= next != next;
  }
  return nan != 0;
}

}  // namespace

bool metaplastic_adam(const MetaplasticAdam& p, int64_t begin, int64_t end) {
  const int64_t used = ceil_div(p.K, kWordBits);  // words of a row that hold weights
  bool nan = false;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t row = unit / used, word = unit % used;
    const int64_t n = smaller(kWordBits, p.K - word * kWordBits), at = row * p.K + word * kWordBits;
    float* w = p.weight + at;
    if (n == kWordBits)
      nan |= update(p, kWordBits, w, p.grad + at, p.exp_avg + at, p.exp_avg_sq + at);
    else
      nan |= update(p, n, w, p.grad + at, p.exp_avg + at, p.exp_avg_sq + at);
    if (p.sign_bits == nullptr) continue;
    uint64_t* bits = p.sign_bits + row * p.words + word;
    bool ignored = false;
    if (n == kWordBits) {
      *bits = signs_of_64(w, ignored);
    } else {
      *bits = 0;
      for (int64_t i = 0; i < n; ++i) *bits |= static_cast<uint64_t>(w[i] >= 0.0f) << i;
    }
  }
  return nan;
}

}  // namespace engram::cpu::ENGRAM_ISA
