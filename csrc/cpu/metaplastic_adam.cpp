// metaplastic_adam_: moments, consolidation, hidden weight and fresh sign bits in one pass over memory.
//
//   g   = grad + weight_decay * W
//   mu  = beta1 mu + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2        mu = 0 if |mu| < 2^-126
//   mu' = mu (1 - tanh^2(m |W|))  if the step would shrink |W|, that is W mu > 0;  else mu
//   W  -= step_size * mu' / (sqrt(v) + eps),   step_size = lr sqrt(1 - beta2^t) / (1 - beta1^t)
//   W   = weight_bound if W > weight_bound, -weight_bound if W < -weight_bound;  infinity bounds nothing
//
// Where g is not finite, W, mu and v stay as they are; where the new W would be a NaN, W does. Either is reported.
// (Laborieux et al. 2021, eq. 2 and their published optimizer, which tests the sign of the momentum.)
// Numbers below 2^-126 take a processor much longer than others, and a mu that only decays gets there in some 800 steps
// and would never leave.
// 1 - tanh^2(z) = 4 t / (1 + t)^2 with t = e^{-2z}. All tensors [N, K]: the weight float32 or bfloat16, the moments
// float32 or in one of the compact formats of core/compact.h, rounded with random bits; the weight is clipped before,
// so that a bound which bfloat16 represents holds after rounding too. Range in words of 64 weights. Bound by memory
// (float32: 4 reads and 3 writes of 4 bytes a weight, and one bit); the compact formats by their conversions and random
// numbers. Only single IEEE operations and no fused multiply-add, so that every instruction set computes the same bits.
#include <cstring>
#include <type_traits>

#include "core/compact.h"
#include "cpu/simd.h"
#include "cpu/tables.h"

namespace engram::cpu::ENGRAM_ISA {

namespace {

static_assert(kScaleBlock == kWordBits, "a word has one scale");

// 2^x for x <= 0, relative error below 3e-7; below -125 the result is 2^-125. Estrin's scheme, since the length of the
// chain of operations, not their number, would bound the update.
ENGRAM_INLINE float power_of_two(float x) {
  x = x > -125.0f ? x : -125.0f;
  const float shifted = x + 12582912.0f;  // 1.5 * 2^23: the low bits are the nearest integer
  const float f = x - (shifted - 12582912.0f);
  const float f2 = f * f;
  const float low = 1.0f + f * 0.693146862f, middle = 0.240222379f + f * 0.0555089302f;
  const float high = 0.00967169809f + f * 0.00132186932f;
  const float p = low + f2 * (middle + f2 * high);
  return float_from_bits(bits_from_float(p) + (bits_from_float(shifted) << 23));
}

// The update of n <= 64 weights, written to be vectorised. In stages over all of them: operations that wait for each
// other, root and quotient above all, would otherwise fill the processor's window. First the moments, the divisor of
// the step but for its power of t, and the binary logarithm of t.
ENGRAM_INLINE void update_moments(const MetaplasticAdam& p, int64_t n, const float* __restrict w,
                                  const float* __restrict grad, float* __restrict exp_avg, float* __restrict exp_avg_sq,
                                  float* __restrict root, float* __restrict t) {
  constexpr float kLog2E = 1.44269504f;
  constexpr uint32_t kInfinity = 0x7F800000u, kNaN = 0x7FC00000u;
  constexpr float kLeastNormal = 0x1p-126f;
  const float keep1 = p.beta1, take1 = p.one_minus_beta1, keep2 = p.beta2, take2 = p.one_minus_beta2;
  const float slope = -2.0f * kLog2E * p.metaplasticity;
  for (int64_t i = 0; i < n; ++i) {
    const float weight = w[i];
    const float g = grad[i] + p.weight_decay * weight;
    const bool finite = (bits_from_float(g) & kInfinity) != kInfinity;
    // computed for all and then chosen: arithmetic on one side of a choice would keep the loop from being vectorised
    const float old_mu = exp_avg[i], old_v = exp_avg_sq[i];
    const float sum = keep1 * old_mu + take1 * g, next_v = keep2 * old_v + take2 * (g * g);
    const float next_mu = __builtin_fabsf(sum) < kLeastNormal ? 0.0f : sum;
    const float next_root = __builtin_sqrtf(next_v) + p.eps;
    const float mu = finite ? next_mu : old_mu;
    exp_avg[i] = mu;
    exp_avg_sq[i] = finite ? next_v : old_v;
    root[i] = finite ? next_root : float_from_bits(kNaN);  // no step
    // Same signs: the step would shrink |W|. Otherwise t = 1, and the factor 4 t / (1 + t)^2 is exactly 1, as it is
    // where the weight is 0.
    const bool opposed = static_cast<int32_t>(bits_from_float(weight) ^ bits_from_float(mu)) >= 0;
    t[i] = opposed ? slope * __builtin_fabsf(weight) : 0.0f;
  }
}

// Then the weights. True if one could not be updated.
ENGRAM_INLINE bool update_weights(const MetaplasticAdam& p, int64_t n, const float* __restrict mu,
                                  const float* __restrict root, const float* __restrict t, float* __restrict w) {
  uint32_t failed = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float quotient = (mu[i] * (4.0f * t[i])) / (root[i] * ((1.0f + t[i]) * (1.0f + t[i])));
    const float stepped = w[i] - p.step_size * quotient;
    const bool number = stepped == stepped;
    failed |= static_cast<uint32_t>(!number);
    const float kept = number ? stepped : w[i];
    const float clipped = kept > p.weight_bound ? p.weight_bound : kept;
    w[i] = clipped < -p.weight_bound ? -p.weight_bound : clipped;
  }
  return failed != 0;
}

// How the 64 numbers of a word are held in memory. Formats other than float32 read them into floats and write them
// back; `noise` is that of the random bits of each, `scale` that of the block, made before what does not wait for it.
struct Float32 {
  using Held = float;
};
template <typename Format>
constexpr bool kIsFloat = std::is_same_v<Format, Float32>;

struct BFloat16 {
  using Held = uint16_t;
  ENGRAM_INLINE uint32_t noise(uint32_t random16) { return random16; }
  ENGRAM_INLINE void read(const Held* __restrict from, float, int64_t n, float* __restrict to) {
    for (int64_t i = 0; i < n; ++i) to[i] = from_bfloat16(from[i]);
  }
  ENGRAM_INLINE void write(const float* __restrict from, float, const uint32_t* __restrict noise, int64_t n,
                           Held* __restrict to) {
#if defined(ENGRAM_HAS_COMPACT)
    if (n == kWordBits) return write_bfloat16(from, noise, to);
#endif
    for (int64_t i = 0; i < n; ++i) to[i] = to_bfloat16(from[i], noise[i]);
  }
};

ENGRAM_INLINE void read_codes(const int8_t* from, float scale, int64_t n, float* __restrict to) {
#if defined(ENGRAM_HAS_COMPACT)
  if (n == kWordBits) return read_first_moments(from, scale, to);
#endif
  for (int64_t i = 0; i < n; ++i) to[i] = from_first_moment(from[i], scale);
}
ENGRAM_INLINE void read_codes(const uint8_t* from, float scale, int64_t n, float* __restrict to) {
#if defined(ENGRAM_HAS_COMPACT)
  if (n == kWordBits) return read_second_moments(from, scale, to);
#endif
  for (int64_t i = 0; i < n; ++i) to[i] = from_second_moment(from[i], scale);
}
ENGRAM_INLINE void write_codes(const float* __restrict from, float reciprocal, const uint32_t* __restrict noise,
                               int64_t n, int8_t* __restrict to) {
#if defined(ENGRAM_HAS_COMPACT)
  if (n == kWordBits) return write_first_moments(from, reciprocal, noise, to);
#endif
  for (int64_t i = 0; i < n; ++i) to[i] = to_first_moment(from[i], reciprocal, noise[i]);
}
ENGRAM_INLINE void write_codes(const float* __restrict from, float reciprocal, const uint32_t* __restrict noise,
                               int64_t n, uint8_t* __restrict to) {
#if defined(ENGRAM_HAS_COMPACT)
  if (n == kWordBits) return write_second_moments(from, reciprocal, noise, to);
#endif
  for (int64_t i = 0; i < n; ++i) to[i] = to_second_moment(from[i], reciprocal, noise[i]);
}
ENGRAM_INLINE uint32_t largest_of(const float* from, int64_t n) {
#if defined(ENGRAM_HAS_COMPACT)
  if (n == kWordBits) return largest_magnitude(from);
#endif
  uint32_t largest = 0;  // floats without their sign are ordered like their bits
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t magnitude = bits_from_float(from[i]) & 0x7FFFFFFFu;
    largest = largest < magnitude ? magnitude : largest;
  }
  return largest;
}

template <typename Code, uint32_t kCarry>
struct Scaled {
  using Held = Code;
  ENGRAM_INLINE uint32_t noise(uint32_t random16) { return moment_noise(random16); }
  ENGRAM_INLINE void read(const Held* __restrict from, float scale, int64_t n, float* __restrict to) {
    read_codes(from, scale, n, to);
  }
  ENGRAM_INLINE float scale_of(const float* x, int64_t n) { return block_scale(largest_of(x, n), kCarry); }
  ENGRAM_INLINE void write(const float* __restrict from, float scale, const uint32_t* __restrict noise, int64_t n,
                           Held* __restrict to) {
    write_codes(from, reciprocal_of_scale(scale), noise, n, to);
  }
};
using FirstScaled = Scaled<int8_t, kFirstCarry>;
using SecondScaled = Scaled<uint8_t, kSecondCarry>;
template <typename Format>
constexpr bool kIsScaled = std::is_same_v<Format, FirstScaled>;

// The noise that the 64 units of a row from `unit` are rounded with.
template <typename Weight, typename Moment>
struct Noise {
  alignas(64) uint32_t of_weight[kWordBits], of_moments[kWordBits];

  ENGRAM_INLINE void draw(RoundingRow row, int64_t unit, Noise& noise) {
    const auto first = static_cast<uint32_t>(unit);
    if constexpr (!kIsFloat<Weight>) {
      for (uint32_t i = 0; i < kWordBits; ++i) {
        const uint32_t random = rounding_draw(row, first + i);
        noise.of_weight[i] = random >> 16;
        if constexpr (!kIsFloat<Moment>) noise.of_moments[i] = Moment::noise(random & 0xFFFFu);
      }
    } else {
      alignas(64) uint32_t draws[kWordBits / 2];
      alignas(64) uint16_t halves[kWordBits];
      for (uint32_t i = 0; i < kWordBits / 2; ++i) draws[i] = rounding_draw(row, first / 2 + i);
      memcpy(halves, draws, sizeof halves);
      for (uint32_t i = 0; i < kWordBits; ++i) noise.of_moments[i] = Moment::noise(halves[i]);
    }
  }
};

// Has a word's numbers come to the cache.
template <typename Held>
ENGRAM_INLINE void fetch(const Held* numbers) {
  constexpr int64_t kCacheLine = 64;
  const auto* from = reinterpret_cast<const char*>(numbers);
  for (int64_t i = 0; i < kWordBits * static_cast<int64_t>(sizeof(Held)); i += kCacheLine) __builtin_prefetch(from + i);
}

// n weights of a row from unit `unit`; inlined with n known, so that whole words are vectorised.
template <typename Weight, typename Grad, typename First, typename Second>
ENGRAM_INLINE bool update_word(const MetaplasticAdam& p, RoundingRow rounding, int64_t row, int64_t unit, int64_t n) {
  const int64_t at = row * p.K + unit, block = row * ceil_div(p.K, kScaleBlock) + unit / kScaleBlock;
  auto* weight = static_cast<typename Weight::Held*>(p.weight) + at;
  const auto* grad =
      static_cast<const typename Grad::Held*>(p.grad) + (row - p.grad_row) * p.grad_stride + unit - p.grad_unit;
  auto* exp_avg = static_cast<typename First::Held*>(p.exp_avg) + at;
  auto* exp_avg_sq = static_cast<typename Second::Held*>(p.exp_avg_sq) + at;

  if (p.ahead > 0) fetch(weight + p.ahead), fetch(exp_avg + p.ahead), fetch(exp_avg_sq + p.ahead);

  // float32 is worked on where it lies, everything else in these
  alignas(64) float w_read[kWordBits], g_read[kWordBits], mu_read[kWordBits], v_read[kWordBits];
  float *w = w_read, *mu = mu_read, *v = v_read;
  const float* g = g_read;
  [[maybe_unused]] float first_scale = 1.0f, second_scale = 1.0f;
  if constexpr (kIsFloat<Weight>)
    w = weight;
  else
    Weight::read(weight, 1.0f, n, w_read);
  if constexpr (kIsFloat<Grad>)
    g = grad;
  else
    Grad::read(grad, 1.0f, n, g_read);
  if constexpr (kIsFloat<First>) {
    mu = exp_avg, v = exp_avg_sq;
  } else {
    if constexpr (kIsScaled<First>) first_scale = p.exp_avg_scale[block], second_scale = p.exp_avg_sq_scale[block];
    First::read(exp_avg, first_scale, n, mu_read);
    Second::read(exp_avg_sq, second_scale, n, v_read);
  }
  alignas(64) float root[kWordBits], t[kWordBits];
  update_moments(p, n, w, g, mu, v, root, t);
  if constexpr (kIsScaled<First>) {
    p.exp_avg_scale[block] = first_scale = First::scale_of(mu, n);
    p.exp_avg_sq_scale[block] = second_scale = Second::scale_of(v, n);
  }
  for (int64_t i = 0; i < n; ++i) t[i] = power_of_two(t[i]);
  Noise<Weight, First> noise;
  if constexpr (!kIsFloat<Weight> || !kIsFloat<First>) noise.draw(rounding, unit, noise);
  if constexpr (!kIsFloat<First>) {
    First::write(mu, first_scale, noise.of_moments, n, exp_avg);
    Second::write(v, second_scale, noise.of_moments, n, exp_avg_sq);
  }
  bool failed = update_weights(p, n, mu, root, t, w);
  if constexpr (!kIsFloat<Weight>) {
    Weight::write(w, 1.0f, noise.of_weight, n, weight);
    Weight::read(weight, 1.0f, n, w);  // rounding may have made a small negative weight -0, whose sign is +1
  }
  if (p.sign_bits == nullptr) return failed;
  uint64_t bits = 0;
  if (n == kWordBits) {
    bits = signs_of_64(w, failed);
  } else {
    for (int64_t i = 0; i < n; ++i) bits |= static_cast<uint64_t>(w[i] >= 0.0f) << i;
  }
  uint64_t* to = p.sign_bits + row * p.words + unit / kWordBits;
  *to = bits;
  if (unit + n == p.K)
    for (uint64_t* padding = to + 1; padding < p.sign_bits + (row + 1) * p.words; ++padding) *padding = 0;
  return failed;
}

template <typename Weight, typename Grad, typename First, typename Second>
bool update_words(const MetaplasticAdam& p, Range words) {
  const int64_t used = ceil_div(p.K, kWordBits);  // words of a row that hold weights
  bool failed = false;
  for (int64_t word = words.begin; word < words.end;) {
    const int64_t row = word / used, end = smaller(words.end, (row + 1) * used);
    const RoundingRow rounding = rounding_row(p.rounding, p.first_row + static_cast<uint64_t>(row));
    for (int64_t unit = word % used * kWordBits; word < end; ++word, unit += kWordBits) {
      if (p.K - unit >= kWordBits)
        failed |= update_word<Weight, Grad, First, Second>(p, rounding, row, unit, kWordBits);
      else
        failed |= update_word<Weight, Grad, First, Second>(p, rounding, row, unit, p.K - unit);
    }
  }
  return failed;
}

template <typename Weight, typename Grad>
bool update_formats(const MetaplasticAdam& p, Range words) {
  switch (p.moments) {
    case Moments::kFloat32:
      return update_words<Weight, Grad, Float32, Float32>(p, words);
    case Moments::kBFloat16:
      return update_words<Weight, Grad, BFloat16, BFloat16>(p, words);
    default:
      return update_words<Weight, Grad, FirstScaled, SecondScaled>(p, words);
  }
}

}  // namespace

bool metaplastic_adam(const MetaplasticAdam& p, Range words) {
  if (p.weight_element == Element::kFloat32) return update_formats<Float32, Float32>(p, words);
  if (p.grad_element == Element::kFloat32) return update_formats<BFloat16, Float32>(p, words);
  return update_formats<BFloat16, BFloat16>(p, words);
}

}  // namespace engram::cpu::ENGRAM_ISA
