// pack_signs, pack_window, unpack_signs and the small bit services of the other operators.
//
//   bits[row] = 1{x[row] >= 0}            sign(0) = sign(-0) = +1; a NaN has no sign and is reported
//   bits[row] = 1{|x[row]| <= width} & gate[row]
//
// Bound by memory: one read of x. 64 values become one word; a tail is copied into a padded block first.
#include <cstring>

#include "cpu/simd.h"
#include "cpu/tables.h"

namespace engram::cpu::ENGRAM_ISA {

namespace {

constexpr uint16_t kBFloat16Infinity = 0x7F80, kFloat16Infinity = 0x7C00;

template <typename T, typename Signs>
bool pack_rows(const T* x, T padding, int64_t k, uint64_t* bits, Range rows, Signs signs) {
  const int64_t words = words_for(k), full = k / kWordBits;
  bool nan = false;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const T* in = x + row * k;
    uint64_t* out = bits + row * words;
    for (int64_t word = 0; word < full; ++word) out[word] = signs(in + word * kWordBits, nan);
    for (int64_t word = full; word < words; ++word) out[word] = 0;
    const int64_t tail = k - full * kWordBits;
    if (tail > 0) {
      T block[kWordBits];
      for (int64_t i = 0; i < kWordBits; ++i) block[i] = i < tail ? in[full * kWordBits + i] : padding;
      out[full] = signs(block, nan);
    }
  }
  return nan;
}

template <typename T>
void unpack_rows(const UnpackSigns& p, Range rows) {
  const T plus = static_cast<T>(p.plus), minus = static_cast<T>(p.minus);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    for (int64_t word = 0; word * kWordBits < p.K; ++word) {
      const uint64_t w = p.bits[row * p.words + word];
      T* block = static_cast<T*>(p.out) + row * p.K + word * kWordBits;
      const int64_t n = smaller(kWordBits, p.K - word * kWordBits);
      for (int64_t i = 0; i < n; ++i) block[i] = w >> i & 1 ? plus : minus;
    }
  }
}

}  // namespace

bool pack_signs(const PackSigns& p, Range rows) {
  if (p.element == Element::kFloat32) {
    return pack_rows(static_cast<const float*>(p.x), -1.0f, p.K, p.bits, rows,
                     [](const float* block, bool& nan) { return signs_of_64(block, nan); });
  }
  const uint16_t infinity = p.element == Element::kBFloat16 ? kBFloat16Infinity : kFloat16Infinity;
  const uint16_t minus_infinity = infinity | 0x8000;
  return pack_rows(static_cast<const uint16_t*>(p.x), minus_infinity, p.K, p.bits, rows,
                   [infinity](const uint16_t* block, bool& nan) { return signs_of_64(block, infinity, nan); });
}

void pack_window(const PackWindow& p, Range rows) {
  const float outside = __builtin_nanf(""), width = p.width;
  pack_rows(p.x, outside, p.K, p.bits, rows, [width](const float* block, bool&) { return window_of_64(block, width); });
  if (p.gate == nullptr) return;
  const int64_t words = p.words;  // in a register: a word that is written might be p.words, for all the compiler knows
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    uint64_t* bits = p.bits + row * words;
    const uint64_t* gate = p.gate + row * p.gate_stride;
    for (int64_t word = 0; word < words; ++word) bits[word] &= gate[word];
  }
}

void unpack_signs(const UnpackSigns& p, Range rows) {
  switch (p.size) {
    case 1:
      return unpack_rows<uint8_t>(p, rows);
    case 2:
      return unpack_rows<uint16_t>(p, rows);
    case 4:
      return unpack_rows<uint32_t>(p, rows);
    default:
      return unpack_rows<uint64_t>(p, rows);
  }
}

void popcount_rows(const PopcountRows& p, Range rows) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const uint64_t* bits = p.bits + row * p.words;
    Bits counts = bits_zero();
    int64_t word = 0;
    for (; word + kBitLanes <= p.words; word += kBitLanes)
      counts = add_wide(counts, widen(count(bits_load(bits + word))));
    int64_t sum = bits_total(counts);
    for (; word < p.words; ++word) sum += scalar_popcount(bits[word]);
    p.counts[row] = static_cast<int32_t>(sum);
  }
}

void transpose_bits(const TransposeBits& p, Range unit_words) {
  const int64_t words = words_for(p.K), out_words = words_for(p.rows);
  uint64_t* out = p.out;
  Words block[kWordBits];
  for (int64_t unit_word = unit_words.begin; unit_word < unit_words.end; unit_word += kWordLanes) {
    const int64_t lanes = smaller<int64_t>(kWordLanes, unit_words.end - unit_word);
    for (int64_t row_word = 0; row_word < out_words; ++row_word) {
      const int64_t first = row_word * kWordBits;
      for (int64_t i = 0; i < kWordBits; ++i) {
        block[i] = Words{};
        if (first + i >= p.rows) continue;
        const uint64_t* from = p.bits + (first + i) * words + unit_word;
        if (lanes == kWordLanes)
          memcpy(&block[i], from, sizeof block[i]);
        else
          memcpy(&block[i], from, static_cast<size_t>(lanes) * sizeof(uint64_t));
      }
      transpose_64x64(block);
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const int64_t unit = (unit_word + lane) * kWordBits;
        for (int64_t j = 0; j < smaller(kWordBits, p.K - unit); ++j)
          out[(unit + j) * out_words + row_word] = block[j][lane];
      }
    }
  }
}

void zero_unrecruited(const ZeroUnrecruited& p, Range rows) {
  constexpr int64_t kGroup = 32;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    float* out = p.y + row * p.K;
    const uint64_t* m = p.mask + row * p.mask_stride;
    int64_t i = 0;
    for (; i + kGroup <= p.K; i += kGroup) {
      const Bits32 bits = bits32(static_cast<uint32_t>(m[i / kWordBits] >> i % kWordBits));
      for (int v = 0; v < kGroup / kLanes; ++v) {
        float* at = out + i + v * kLanes;
        store(at, keep_where(mask_of(bits, v), load(at)));
      }
    }
    for (; i < p.K; ++i) out[i] = m[i / kWordBits] >> (i % kWordBits) & 1 ? out[i] : 0.0f;
  }
}

}  // namespace engram::cpu::ENGRAM_ISA
