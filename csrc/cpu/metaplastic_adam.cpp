// metaplastic_adam_: moments, consolidation, hidden weight and fresh sign bits in one pass over memory.
//
//   g   = grad + weight_decay * W
//   mu  = beta1 mu + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
//   mu' = mu (1 - tanh^2(m |W|))  if the step would shrink |W|, that is W mu > 0;  else mu
//   W  -= step_size * mu' / (sqrt(v) + eps),   step_size = lr sqrt(1 - beta2^t) / (1 - beta1^t)
//
// (Laborieux et al. 2021, eq. 2 and their published optimizer, which tests the sign of the momentum.)
// 1 - tanh^2(z) = 4 e^{-2z} / (1 + e^{-2z})^2. All tensors [N, K]: the weight float32 or bfloat16, the moments float32
// or one of the compact formats of core/compact.h, in which case each is rounded with its bits of the unit's draw.
// Range in words of 64 weights. Bound by memory (float32: 4 reads and 3 writes of 4 bytes a weight, and one bit); the
// compact formats by their conversions and draws. Only single IEEE operations and no fused multiply-add, so that every
// instruction set computes the same bits.
#include <cstring>
#include <type_traits>

#include "core/compact.h"
#include "cpu/draws.h"
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
    // W mu > 0 by signs, since the product of two tiny numbers underflows to 0
    const bool opposed = ((weight > 0.0f) & (mu > 0.0f)) | ((weight < 0.0f) & (mu < 0.0f));
    const float root = __builtin_sqrtf(v) + p.eps;
    const float numerator = opposed ? mu * (4.0f * t) : mu;
    const float denominator = opposed ? root * ((1.0f + t) * (1.0f + t)) : root;
    const float next = weight - p.step_size * (numerator / denominator);
    w[i] = next;
    nan |= next != next;
  }
  return nan != 0;
}

// How the 64 numbers of a word are held in memory. Each format reads them into floats and writes them back; `draws` are
// those of the units, `scale` that of the block.
struct Float32 {
  using Held = float;
  ENGRAM_INLINE void read(const Held* from, const float*, int64_t n, float* to) {
    memcpy(to, from, static_cast<size_t>(n) * sizeof(float));
  }
  ENGRAM_INLINE void write(const float* from, const uint32_t*, int64_t n, Held* to, float*) {
    memcpy(to, from, static_cast<size_t>(n) * sizeof(float));
  }
};

template <uint32_t (*kDraw)(uint32_t), int kDrawWidth>
struct BFloat16 {
  using Held = uint16_t;
  ENGRAM_INLINE void read(const Held* from, const float*, int64_t n, float* to) {
    for (int64_t i = 0; i < n; ++i) to[i] = from_bfloat16(from[i]);
  }
  ENGRAM_INLINE void write(const float* from, const uint32_t* draws, int64_t n, Held* to, float*) {
    for (int64_t i = 0; i < n; ++i) to[i] = to_bfloat16(from[i], kDraw(draws[i]), kDrawWidth);
  }
};
using WeightBFloat16 = BFloat16<weight_draw, kWeightDrawBits>;
using FirstBFloat16 = BFloat16<first_moment_draw, kFirstDrawBits>;
using SecondBFloat16 = BFloat16<second_moment_draw, kSecondDrawBits>;

template <typename Code, float (*kDecode)(Code, float), Code (*kEncode)(float, float, uint32_t)>
struct Scaled {
  using Held = Code;
  ENGRAM_INLINE void read(const Held* from, const float* scale, int64_t n, float* to) {
    const float by = *scale;
    Code codes[kWordBits];  // a local array, which the compiler knows not to overlap
    memcpy(codes, from, static_cast<size_t>(n) * sizeof(Code));
    for (int64_t i = 0; i < n; ++i) to[i] = kDecode(codes[i], by);
  }
  ENGRAM_INLINE void write(const float* from, const uint32_t* draws, int64_t n, Held* to, float* scale) {
    uint32_t largest = 0;  // floats without their sign are ordered like their bits
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t magnitude = bits_from_float(from[i]) & 0x7FFFFFFFu;
      largest = largest < magnitude ? magnitude : largest;
    }
    *scale = block_scale(largest);
    const float reciprocal = reciprocal_of_scale(*scale);
    Code codes[kWordBits];  // a local array, which the compiler knows not to overlap
    for (int64_t i = 0; i < n; ++i) codes[i] = kEncode(from[i], reciprocal, draws[i]);
    memcpy(to, codes, static_cast<size_t>(n) * sizeof(Code));
  }
};
using FirstScaled = Scaled<int8_t, from_first_moment, to_first_moment>;
using SecondScaled = Scaled<uint8_t, from_second_moment, to_second_moment>;

// n weights of a row from unit `unit`; inlined with n known, so that whole words are vectorised.
template <typename Weight, typename Grad, typename First, typename Second>
ENGRAM_INLINE bool update_word(const MetaplasticAdam& p, const Draws& source, int64_t row, int64_t unit, int64_t n) {
  constexpr bool kInPlace = std::is_same_v<Weight, Float32> && std::is_same_v<First, Float32>;
  const int64_t at = row * p.K + unit, block = row * ceil_div(p.K, kScaleBlock) + unit / kScaleBlock;
  auto* weight = static_cast<typename Weight::Held*>(p.weight) + at;
  const auto* grad =
      static_cast<const typename Grad::Held*>(p.grad) + (row - p.grad_row) * p.grad_stride + unit - p.grad_unit;
  auto* exp_avg = static_cast<typename First::Held*>(p.exp_avg) + at;
  auto* exp_avg_sq = static_cast<typename Second::Held*>(p.exp_avg_sq) + at;

  alignas(64) float w_read[kWordBits], g_read[kWordBits], mu_read[kWordBits], v_read[kWordBits];
  float *w = w_read, *mu = mu_read, *v = v_read;
  const float* g = g_read;
  if constexpr (std::is_same_v<Grad, Float32>)
    g = grad;
  else
    Grad::read(grad, nullptr, n, g_read);
  bool nan;
  if constexpr (kInPlace) {
    w = weight, mu = exp_avg, v = exp_avg_sq;
    nan = update(p, n, w, g, mu, v);
  } else {
    alignas(64) uint32_t draws[kDrawGroup];
    source.group(p.first_row + static_cast<uint64_t>(row), unit, draws);
    Weight::read(weight, nullptr, n, w);
    First::read(exp_avg, p.exp_avg_scale + block, n, mu);
    Second::read(exp_avg_sq, p.exp_avg_sq_scale + block, n, v);
    nan = update(p, n, w, g, mu, v);
    Weight::write(w, draws, n, weight, nullptr);
    First::write(mu, draws, n, exp_avg, p.exp_avg_scale + block);
    Second::write(v, draws, n, exp_avg_sq, p.exp_avg_sq_scale + block);
    // rounding may have made a small negative weight -0, whose sign is +1
    if constexpr (!std::is_same_v<Weight, Float32>) Weight::read(weight, nullptr, n, w);
  }
  if (p.sign_bits == nullptr) return nan;
  uint64_t bits = 0;
  bool ignored = false;
  if (n == kWordBits)
    bits = signs_of_64(w, ignored);
  else
    for (int64_t i = 0; i < n; ++i) bits |= static_cast<uint64_t>(w[i] >= 0.0f) << i;
  uint64_t* word = p.sign_bits + row * p.words + unit / kWordBits;
  *word = bits;
  if (unit + n == p.K)
    for (uint64_t* padding = word + 1; padding < p.sign_bits + (row + 1) * p.words; ++padding) *padding = 0;
  return nan;
}

template <typename Weight, typename Grad, typename First, typename Second>
bool update_words(const MetaplasticAdam& p, int64_t begin, int64_t end) {
  const int64_t used = ceil_div(p.K, kWordBits);  // words of a row that hold weights
  const Draws source(p.seed, p.offset);
  bool nan = false;
  for (int64_t word = begin; word < end; ++word) {
    const int64_t row = word / used, unit = word % used * kWordBits;
    if (p.K - unit >= kWordBits)
      nan |= update_word<Weight, Grad, First, Second>(p, source, row, unit, kWordBits);
    else
      nan |= update_word<Weight, Grad, First, Second>(p, source, row, unit, p.K - unit);
  }
  return nan;
}

template <typename Weight, typename Grad>
bool update_moments(const MetaplasticAdam& p, int64_t begin, int64_t end) {
  switch (p.moments) {
    case Moments::kFloat32:
      return update_words<Weight, Grad, Float32, Float32>(p, begin, end);
    case Moments::kBFloat16:
      return update_words<Weight, Grad, FirstBFloat16, SecondBFloat16>(p, begin, end);
    default:
      return update_words<Weight, Grad, FirstScaled, SecondScaled>(p, begin, end);
  }
}

}  // namespace

bool metaplastic_adam(const MetaplasticAdam& p, int64_t begin, int64_t end) {
  if (p.weight_element == Element::kFloat32) return update_moments<Float32, Float32>(p, begin, end);
  if (p.grad_element == Element::kFloat32) return update_moments<WeightBFloat16, Float32>(p, begin, end);
  return update_moments<WeightBFloat16, WeightBFloat16>(p, begin, end);
}

}  // namespace engram::cpu::ENGRAM_ISA
