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
// so that a bound which bfloat16 represents holds after rounding too. Range in words of 64 weights. float32 is bound by
// memory (4 reads and 3 writes of 4 bytes a weight, and one bit), compact formats by arithmetic: with int8 moments and
// bfloat16 weights 68 products, 60 sums, 4 roots and 4 quotients a word, in vectors of 16, and as many operations again
// to read, round, draw and pack. Only single IEEE operations, so that every instruction set computes the same bits; a
// product is fused to a sum only where it is exact.
//
// A word is worked on in vectors, as if every step were a number and every scale in the middle of its range. Where that
// turns out wrong nothing has been written, and the word is worked on number by number.
#include <cstring>
#include <type_traits>

#include "core/compact.h"
#include "cpu/simd.h"
#include "cpu/tables.h"

namespace engram::cpu::ENGRAM_ISA {

namespace {

static_assert(kScaleBlock == kWordBits, "a word has one scale");

constexpr uint32_t kSign = 0x80000000u, kInfinity = 0x7F800000u, kNaN = 0x7FC00000u;
constexpr float kLeastPower = -125.0f, kLeastNormal = 0x1p-126f;

// Of the exponent of t: slope * |W| is its binary logarithm.
ENGRAM_INLINE float slope_of(const MetaplasticAdam& p) { return -2.0f * 1.44269504f * p.metaplasticity; }

// 4 * 2^x for -125 <= x <= 0, relative error below 3e-7. Estrin's scheme, since the length of the chain of operations,
// not their number, would bound the update.
template <typename T>
ENGRAM_INLINE T four_times_power_of_two(T x) {
  // 1.5 * 2^23: the low bits are the nearest integer, and 2 more
  constexpr float kInteger = 12582912.0f, kShift = kInteger + 2.0f;
  const T shifted = x + kShift;
  const T f = x - (shifted - kShift);
  const T f2 = f * f;
  const T low = 1.0f + f * 0.693146862f, middle = 0.240222379f + f * 0.0555089302f;
  const T high = 0.00967169809f + f * 0.00132186932f;
  const T p = low + f2 * (middle + f2 * high);
  return floats_of(bits_of(p) + (bits_of(shifted) << 23));
}

// How numbers are held in memory: `read` and `write` one, `load` and `store` a word. `noise` makes what rounds a moment
// of the low half of a draw; scales are those of a block.
struct Float32 {
  using Held = float;
  ENGRAM_INLINE float read(float held, float) { return held; }
  ENGRAM_INLINE float write(float x, float, uint32_t) { return x; }
  ENGRAM_INLINE void load(const float* from, Floats* to) {
    for (int i = 0; i < kWordVectors; ++i) to[i] = engram::cpu::ENGRAM_ISA::load(from + kLanes * i);
  }
  ENGRAM_INLINE void store(const Floats* x, const Lanes*, float* to) {
    for (int i = 0; i < kWordVectors; ++i) engram::cpu::ENGRAM_ISA::store(to + kLanes * i, x[i]);
  }
};
template <typename Format>
constexpr bool kIsFloat = std::is_same_v<Format, Float32>;

struct BFloat16 {
  using Held = uint16_t;
  ENGRAM_INLINE float read(uint16_t held, float) { return from_bfloat16(held); }
  ENGRAM_INLINE uint16_t write(float x, float, uint32_t noise) { return to_bfloat16(x, noise); }
  template <typename T>
  ENGRAM_INLINE T noise(T random) {
    return random & 0xFFFFu;
  }
  ENGRAM_INLINE void load(const uint16_t* from, Floats* to) { read_bfloat16(from, to); }
  ENGRAM_INLINE void store(const Floats* x, const Lanes* noise, uint16_t* to) {
    Lanes sums[kWordVectors];
    for (int i = 0; i < kWordVectors; ++i) sums[i] = bits_of(x[i]) + noise[i];
    write_bfloat16(sums, to);
  }
};

struct FirstScaled {
  using Held = int8_t;
  ENGRAM_INLINE float read(int8_t held, float scale) { return from_first_moment(held, scale); }
  ENGRAM_INLINE int8_t write(float x, float reciprocal, uint32_t noise) {
    return to_first_moment(x, reciprocal, noise);
  }
  template <typename T>
  ENGRAM_INLINE T noise(T random) {
    return moment_noise(random);
  }
  ENGRAM_INLINE void load(const int8_t* from, const float* scale, Floats* to) { read_first_moments(from, scale, to); }
  ENGRAM_INLINE void store(const Floats* x, const BlockScales& scales, const Lanes* noise, int8_t* to) {
    write_first_codes(x, scales, noise, to);
  }
};
struct SecondScaled {
  using Held = uint8_t;
  ENGRAM_INLINE float read(uint8_t held, float scale) { return from_second_moment(held, scale); }
  ENGRAM_INLINE uint8_t write(float x, float reciprocal, uint32_t noise) {
    return to_second_moment(x, reciprocal, noise);
  }
  ENGRAM_INLINE void load(const uint8_t* from, const float* scale, Floats* to) { read_second_moments(from, scale, to); }
  ENGRAM_INLINE void store(const Floats* x, const BlockScales& scales, const Lanes* noise, uint8_t* to) {
    write_second_codes(x, scales, noise, to);
  }
};
template <typename Format>
constexpr bool kIsScaled = std::is_same_v<Format, FirstScaled>;

// Where the numbers of a word lie.
template <typename Weight, typename Grad, typename First, typename Second>
struct Place {
  typename Weight::Held* weight;
  const typename Grad::Held* grad;
  typename First::Held* exp_avg;
  typename Second::Held* exp_avg_sq;
  float *first_scale, *second_scale;
};

// The noise that the 64 units of a row from `unit` are rounded with. The counters of draws are sums, not products.
struct Noise {
  Lanes of_weight[kWordVectors], of_moments[kWordVectors];
};
struct DrawSteps {
  alignas(64) uint32_t step[kWordBits];
  constexpr DrawSteps() : step() {
    for (uint32_t i = 0; i < kWordBits; ++i) step[i] = i * kDrawStep;
  }
};
template <typename Weight, typename Moment>
ENGRAM_INLINE void draw(RoundingRow row, int64_t unit, Noise& noise) {
  static constexpr DrawSteps kSteps;
  constexpr bool kOwnDraw = !kIsFloat<Weight>;
  const uint32_t start = row.start + static_cast<uint32_t>(kOwnDraw ? unit : unit / 2) * kDrawStep;
  const auto* steps = reinterpret_cast<const Lanes*>(kSteps.step);
  if constexpr (kOwnDraw) {
    for (int i = 0; i < kWordVectors; ++i) {
      const Lanes random = mixed(steps[i] + start, row.key);
      noise.of_weight[i] = random >> 16;
      if constexpr (!kIsFloat<Moment>) noise.of_moments[i] = Moment::noise(random);
    }
  } else {
    Lanes random[kWordVectors / 2];
    for (int i = 0; i < kWordVectors / 2; ++i) random[i] = mixed(steps[i] + start, row.key);
    alignas(64) uint16_t halves[kWordBits];
    memcpy(halves, random, sizeof halves);
    for (int i = 0; i < kWordVectors; ++i) noise.of_moments[i] = Moment::noise(widened(halves + kLanes * i));
  }
}

// Whether the codes of a block can be read as floats that the scale has multiplied already: where code 0 is held as a
// normal number and the scale is a power of two, or where it is 0.
ENGRAM_INLINE bool can_shift(uint32_t scale_bits, uint32_t zero_bits) {
  const uint32_t least = (uint32_t{128} << 23) - zero_bits, most = uint32_t{253} << 23;
  return scale_bits == 0 || (scale_bits - least <= most - least && (scale_bits & 0x007FFFFFu) == 0);
}
ENGRAM_INLINE uint32_t bits_at(const float* p) {
  uint32_t bits;
  memcpy(&bits, p, sizeof bits);
  return bits;
}
// What a block with a scale of 0 is read as.
alignas(64) constexpr uint8_t kNoCodes[kWordBits] = {};
constexpr float kNoScale = 1.0f;

// A whole word. False, and nothing written, if it has to be worked on number by number: where a scale cannot be shifted
// or a second moment is not finite, as it is where a gradient is not, and where a weight would be a NaN.
template <typename Weight, typename Grad, typename First, typename Second>
ENGRAM_INLINE bool update_word(const MetaplasticAdam& p, const Place<Weight, Grad, First, Second>& at,
                               RoundingRow rounding, int64_t unit, uint64_t* sign_bits) {
  Floats w[kWordVectors], g[kWordVectors], mu[kWordVectors], v[kWordVectors], root[kWordVectors], t4[kWordVectors];
  if constexpr (kIsScaled<First>) {
    const uint32_t first = bits_at(at.first_scale), second = bits_at(at.second_scale);
    if (!can_shift(first, kFirstBits) || !can_shift(second, kSecondBits)) return false;
    First::load(first == 0 ? reinterpret_cast<const int8_t*>(kNoCodes) : at.exp_avg,
                first == 0 ? &kNoScale : at.first_scale, mu);
    Second::load(second == 0 ? kNoCodes : at.exp_avg_sq, second == 0 ? &kNoScale : at.second_scale, v);
  } else {
    First::load(at.exp_avg, mu);
    Second::load(at.exp_avg_sq, v);
  }
  Weight::load(at.weight, w);
  Grad::load(at.grad, g);
  Lanes largest_mu = {}, largest_v = {};
  for (int i = 0; i < kWordVectors; ++i) {
    const Floats step = g[i] + p.weight_decay * w[i];
    const Floats sum = p.beta1 * mu[i] + p.one_minus_beta1 * step;
    mu[i] = floats_of(bits_of(sum) & ~kSign) < all(kLeastNormal) ? zero() : sum;
    v[i] = p.beta2 * v[i] + p.one_minus_beta2 * (step * step);
    root[i] = square_root(v[i]) + p.eps;
    largest_v = larger(largest_v, bits_of(v[i]));
    if constexpr (kIsScaled<First>) largest_mu = larger(largest_mu, bits_of(mu[i]) & ~kSign);
  }
  [[maybe_unused]] BlockScales scales;
  if constexpr (kIsScaled<First>) {
    if (!make_scales(largest_mu, largest_v, &scales)) return false;
  } else {
    if (any_at_least(largest_v, kInfinity)) return false;
  }
  const float slope = slope_of(p);
  const Lanes least_power = Lanes{} + bits_from_float(kLeastPower), negative_zero = Lanes{} + kSign;
  for (int i = 0; i < kWordVectors; ++i) {
    // Negative where the step would shrink |W|. As integers negative numbers are above positive ones, -0 the least.
    const Lanes x = bits_of(slope * w[i]) ^ (bits_of(mu[i]) & kSign);
    t4[i] = four_times_power_of_two(floats_of(larger(smaller_of(x, least_power), negative_zero)));
  }
  for (int i = 0; i < kWordVectors; ++i) {
    const Floats one_and_t = add_product(all(1.0f), t4[i], all(0.25f));  // a quarter is exact
    w[i] = w[i] - p.step_size * ((mu[i] * t4[i]) / (root[i] * (one_and_t * one_and_t)));
  }
  if (any_nan(w)) return false;
  if (p.weight_bound < float_from_bits(kInfinity))
    for (int i = 0; i < kWordVectors; ++i) w[i] = within(w[i], all(p.weight_bound));
  [[maybe_unused]] Noise noise;
  if constexpr (!kIsFloat<Weight> || !kIsFloat<First>) draw<Weight, First>(rounding, unit, noise);
  if constexpr (kIsScaled<First>) {
    write_scales(scales, at.first_scale, at.second_scale);
    First::store(mu, scales, noise.of_moments, at.exp_avg);
    Second::store(v, scales, noise.of_moments, at.exp_avg_sq);
  } else {
    First::store(mu, noise.of_moments, at.exp_avg);
    Second::store(v, noise.of_moments, at.exp_avg_sq);
  }
  Weight::store(w, noise.of_weight, at.weight);
  if (sign_bits == nullptr) return true;
  if constexpr (kIsFloat<Weight>)
    *sign_bits = signs_of(w);
  else
    *sign_bits = signs_of(at.weight);  // rounding may have made a small negative weight -0, whose sign is +1
  return true;
}

// n <= 64 weights of a row, one by one. True if one could not be updated.
template <typename Weight, typename Grad, typename First, typename Second>
__attribute__((noinline)) bool update_weights(const MetaplasticAdam& p, const Place<Weight, Grad, First, Second>& at,
                                              RoundingRow rounding, int64_t unit, int64_t n, uint64_t* sign_bits) {
  const float slope = slope_of(p);
  float first_scale = 1.0f, second_scale = 1.0f;
  if constexpr (kIsScaled<First>) first_scale = *at.first_scale, second_scale = *at.second_scale;
  float w[kWordBits], mu[kWordBits], v[kWordBits];
  uint32_t noise_of_weight[kWordBits], noise_of_moments[kWordBits];
  uint32_t largest_mu = 0, largest_v = 0;
  bool failed = false;
  for (int64_t i = 0; i < n; ++i) {
    const float weight = Weight::read(at.weight[i], 1.0f);
    const float old_mu = First::read(at.exp_avg[i], first_scale), old_v = Second::read(at.exp_avg_sq[i], second_scale);
    const float g = Grad::read(at.grad[i], 1.0f) + p.weight_decay * weight;
    const bool finite = (bits_from_float(g) & kInfinity) != kInfinity;
    const float sum = p.beta1 * old_mu + p.one_minus_beta1 * g;
    mu[i] = !finite ? old_mu : __builtin_fabsf(sum) < kLeastNormal ? 0.0f : sum;
    v[i] = finite ? p.beta2 * old_v + p.one_minus_beta2 * (g * g) : old_v;
    const float root = finite ? __builtin_sqrtf(v[i]) + p.eps : float_from_bits(kNaN);  // no step
    const float x = float_from_bits(bits_from_float(slope * weight) ^ (bits_from_float(mu[i]) & kSign));
    const float shrinking = x < 0.0f ? x : 0.0f;
    const float t4 = four_times_power_of_two(shrinking > kLeastPower ? shrinking : kLeastPower),
                one_and_t = 1.0f + t4 * 0.25f;
    const float stepped = weight - p.step_size * ((mu[i] * t4) / (root * (one_and_t * one_and_t)));
    const bool number = stepped == stepped;
    failed |= !number;
    const float kept = number ? stepped : weight;
    const float clipped = kept > p.weight_bound ? p.weight_bound : kept;
    w[i] = clipped < -p.weight_bound ? -p.weight_bound : clipped;
    const uint32_t size_mu = bits_from_float(mu[i]) & ~kSign, size_v = bits_from_float(v[i]) & ~kSign;
    largest_mu = largest_mu < size_mu ? size_mu : largest_mu;
    largest_v = largest_v < size_v ? size_v : largest_v;
    if constexpr (!kIsFloat<Weight>) {
      const uint32_t random = rounding_draw(rounding, static_cast<uint32_t>(unit + i));
      noise_of_weight[i] = random >> 16, noise_of_moments[i] = random & 0xFFFFu;
    } else if constexpr (!kIsFloat<First>) {
      const uint32_t random = rounding_draw(rounding, static_cast<uint32_t>((unit + i) / 2));
      noise_of_moments[i] = (unit + i) % 2 == 0 ? random & 0xFFFFu : random >> 16;
    }
  }
  float by1 = 1.0f, by2 = 1.0f;
  if constexpr (kIsScaled<First>) {
    const float scale1 = block_scale(largest_mu, kFirstCarry), scale2 = block_scale(largest_v, kSecondCarry);
    *at.first_scale = scale1, *at.second_scale = scale2;
    by1 = reciprocal_of_scale(scale1), by2 = reciprocal_of_scale(scale2);
  }
  uint64_t bits = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t noise = 0;
    if constexpr (!kIsFloat<First>) noise = First::noise(noise_of_moments[i]);
    at.exp_avg[i] = First::write(mu[i], by1, noise);
    at.exp_avg_sq[i] = Second::write(v[i], by2, noise);
    at.weight[i] = Weight::write(w[i], 1.0f, kIsFloat<Weight> ? 0 : noise_of_weight[i]);
    // as rounded, which may have made a small negative weight -0, whose sign is +1
    bits |= static_cast<uint64_t>(Weight::read(at.weight[i], 1.0f) >= 0.0f) << i;
  }
  if (sign_bits != nullptr) *sign_bits = bits;
  return failed;
}

// Has a word's numbers come to the cache.
template <typename Held>
ENGRAM_INLINE void fetch(const Held* numbers) {
  constexpr int64_t kCacheLine = 64;
  const auto* from = reinterpret_cast<const char*>(numbers);
  for (int64_t i = 0; i < kWordBits * static_cast<int64_t>(sizeof(Held)); i += kCacheLine) __builtin_prefetch(from + i);
}

// n < 64 weights at the end of a row, as a whole word that 0 fills up.
template <typename Weight, typename Grad, typename First, typename Second>
__attribute__((noinline)) bool update_tail(const MetaplasticAdam& p, const Place<Weight, Grad, First, Second>& at,
                                           RoundingRow rounding, int64_t unit, int64_t n, uint64_t* sign_bits) {
  alignas(64) typename Weight::Held weight[kWordBits] = {};
  alignas(64) typename Grad::Held grad[kWordBits] = {};
  alignas(64) typename First::Held exp_avg[kWordBits] = {};
  alignas(64) typename Second::Held exp_avg_sq[kWordBits] = {};
  const auto copy = [n](auto* to, const auto* from) { memcpy(to, from, static_cast<size_t>(n) * sizeof *from); };
  copy(weight, at.weight), copy(grad, at.grad), copy(exp_avg, at.exp_avg), copy(exp_avg_sq, at.exp_avg_sq);
  const Place<Weight, Grad, First, Second> filled{weight, grad, exp_avg, exp_avg_sq, at.first_scale, at.second_scale};
  if (!update_word(p, filled, rounding, unit, sign_bits)) return false;
  copy(at.weight, weight), copy(at.exp_avg, exp_avg), copy(at.exp_avg_sq, exp_avg_sq);
  if (sign_bits != nullptr) *sign_bits &= valid_bits(0, n);
  return true;
}

template <typename Weight, typename Grad, typename First, typename Second>
bool update_words(const MetaplasticAdam& p, Range words) {
  const int64_t used = ceil_div(p.K, kWordBits);  // words of a row that hold weights
  bool failed = false;
  for (int64_t word = words.begin; word < words.end;) {
    const int64_t row = word / used, end = smaller(words.end, (row + 1) * used);
    const RoundingRow rounding = rounding_row(p.rounding, p.first_row + static_cast<uint64_t>(row));
    const auto* grad = static_cast<const typename Grad::Held*>(p.grad) + (row - p.grad_row) * p.grad_stride;
    for (; word < end; ++word) {
      const int64_t unit = (word - row * used) * kWordBits, i = row * p.K + unit, n = smaller(p.K - unit, kWordBits);
      constexpr bool kScales = kIsScaled<First>;
      const Place<Weight, Grad, First, Second> at{
          static_cast<typename Weight::Held*>(p.weight) + i, grad + (unit - p.grad_unit),
          static_cast<typename First::Held*>(p.exp_avg) + i, static_cast<typename Second::Held*>(p.exp_avg_sq) + i,
          kScales ? p.exp_avg_scale + word : nullptr,        kScales ? p.exp_avg_sq_scale + word : nullptr};
      if (p.ahead > 0) fetch(at.weight + p.ahead), fetch(at.exp_avg + p.ahead), fetch(at.exp_avg_sq + p.ahead);
      uint64_t* bits = p.sign_bits == nullptr ? nullptr : p.sign_bits + row * p.words + unit / kWordBits;
      if (n == kWordBits ? update_word(p, at, rounding, unit, bits) : update_tail(p, at, rounding, unit, n, bits))
        continue;
      failed |= update_weights(p, at, rounding, unit, n, bits);
    }
    if (p.sign_bits != nullptr && end == (row + 1) * used)
      for (int64_t padding = used; padding < p.words; ++padding) p.sign_bits[row * p.words + padding] = 0;
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
