// What convolutions of bits add to the products of matrices: taps into rows (core/window.h). convolution_grad.cpp has
// the gradients.
//
//   unfold_bits      rows[m] = the taps of output pixel m, 0 where they are padding
//   tap_sums         sums[t,n] = sum_c s(W[n,t,c])
//   finish_pixels    y[m,n] = scale (sums[m,n] + sum over the taps t of m in the padding of tap_sums[t,n])
//   pool_bits        out[m,c] = the or of bit c of the pixels that output pixel m sees, the sign of their maximum
//   interleave_bits  bit i * rows + r of a sample = bit i of its row r
//
// A product takes a padded tap, whose bits are 0, for -1 and counts -s(W) for it: finish_pixels takes that back,
// exactly. So a gate, which costs the product more, is needed only where there is an engram. Of dilation 1 the taps of
// a row of the kernel are one run of bits. All are bound by memory or by the few additions that they name.
#include <cstring>

#include "cpu/bit_runs.h"
#include "cpu/tables.h"

namespace engram::cpu::ENGRAM_ISA {

namespace {

ENGRAM_INLINE void copy_bits(const uint64_t* from, int64_t from_bit, uint64_t* to, int64_t to_bit, int64_t count) {
  if ((from_bit | to_bit | count) % kWordBits == 0) {
    for (int64_t i = 0; i < count / kWordBits; ++i) to[to_bit / kWordBits + i] = from[from_bit / kWordBits + i];
    return;
  }
  for (int64_t i = 0; i < count; i += kWordBits) {
    const int64_t some = smaller(kWordBits, count - i);
    put_bits(to, to_bit + i, some, bits_at(from, from_bit + i, some));
  }
}

// Taps that lie side by side in a row of the kernel and in the image, if their channels do.
ENGRAM_INLINE bool taps_join(const Window& w, int64_t channels) { return w.dilation_w == 1 && channels == w.channels; }

// Calls f(tap, pixel of the image, taps that follow each other from there) for the taps of an output pixel.
template <typename F>
ENGRAM_INLINE void for_taps(const Window& w, const Pixel& p, bool join, const F& f) {
  const Taps rows = taps_of_row(w, p.y), columns = taps_of_column(w, p.x);
  if (columns.first >= columns.last) return;
  for (int64_t i = rows.first; i < rows.last; ++i) {
    const int64_t line = (rows.start + i * w.dilation_h) * w.width + columns.start;
    if (join) {
      f(i * w.kernel_w + columns.first, line + columns.first, columns.last - columns.first);
      continue;
    }
    for (int64_t j = columns.first; j < columns.last; ++j) f(i * w.kernel_w + j, line + j * w.dilation_w, int64_t{1});
  }
}

// Calls f(pixel, m - its first) for the output pixels of a range.
template <typename F>
ENGRAM_INLINE void for_pixels(const Window& w, Range range, const F& f) {
  const int64_t out_h = out_height(w), out_w = out_width(w);
  Pixel pixel = pixel_of(w, range.begin);
  for (int64_t m = 0; m < range.end - range.begin; ++m, advance(pixel, out_h, out_w)) f(pixel, m);
}

}  // namespace

void unfold_bits(const UnfoldBits& p, Range pixels) {
  const Window& w = p.window;
  const int64_t channels = group_channels(w), first = p.group * channels;
  const bool join = taps_join(w, channels);
  for_pixels(w, pixels, [&](const Pixel& pixel, int64_t m) {
    uint64_t* row = p.rows + m * p.words;
    const uint64_t* sample = p.bits + pixel.sample * p.stride;
    for (int64_t i = 0; i < p.words; ++i) row[i] = 0;
    for_taps(w, pixel, join, [&](int64_t tap, int64_t at, int64_t count) {
      copy_bits(sample, at * w.channels + first, row, tap * channels, count * channels);
    });
  });
}

void tap_sums(const TapSums& p, Range taps) {
  for (int64_t tap = taps.begin; tap < taps.end; ++tap)
    for (int64_t n = 0; n < p.N; ++n) {
      int64_t positive = 0;
      for (int64_t i = 0; i < p.channels; i += kWordBits)
        positive +=
            scalar_popcount(bits_at(p.w + n * p.words, tap * p.channels + i, smaller(kWordBits, p.channels - i)));
      p.sums[tap * p.N + n] = static_cast<int32_t>(2 * positive - p.channels);
    }
}

void finish_pixels(const FinishPixels& p, Range pixels) {
  const Window& w = p.window;
  for_pixels(w, pixels, [&](const Pixel& pixel, int64_t m) {
    int32_t* own = p.sums + m * p.N;
    if (p.tap_sums != nullptr) {
      const Taps rows = taps_of_row(w, pixel.y), columns = taps_of_column(w, pixel.x);
      if (rows.last - rows.first < w.kernel_h || columns.last - columns.first < w.kernel_w) {
        for (int64_t i = 0; i < w.kernel_h; ++i)
          for (int64_t j = 0; j < w.kernel_w; ++j) {
            if (i >= rows.first && i < rows.last && j >= columns.first && j < columns.last) continue;
            const int32_t* missing = p.tap_sums + (i * w.kernel_w + j) * p.N;
            for (int64_t n = 0; n < p.N; ++n) own[n] += missing[n];
          }
      }
    }
    const int64_t at = (pixels.begin + m) * p.y_stride;
    if (p.whole == nullptr) {
      float* out = p.y + at;
      for (int64_t n = 0; n < p.N; ++n) out[n] = static_cast<float>(own[n]) * p.scale;
    } else if (p.whole + at != own) {
      memcpy(p.whole + at, own, static_cast<size_t>(p.N) * sizeof *own);
    }
  });
}

void pool_bits(const PoolBits& p, Range samples) {
  const Window& w = p.window;
  const int64_t pixels = out_pixels(w), words = words_for(pixels * w.channels);
  for (int64_t sample = samples.begin; sample < samples.end; ++sample) {
    const uint64_t* bits = p.bits + sample * words_for(units(w));
    uint64_t* out = p.out + sample * words;
    for (int64_t i = 0; i < words; ++i) out[i] = 0;
    for_pixels(w, {0, pixels}, [&](const Pixel& pixel, int64_t m) {
      for_taps(w, pixel, false, [&](int64_t, int64_t at, int64_t) {
        for (int64_t c = 0; c < w.channels; c += kWordBits) {
          const int64_t some = smaller(kWordBits, w.channels - c);
          put_bits(out, m * w.channels + c, some, bits_at(bits, at * w.channels + c, some));
        }
      });
    });
    for (int64_t i = 0; p.flip_bits != nullptr && i < words; ++i) out[i] ^= p.flip_bits[i];
  }
}

void interleave_bits(const InterleaveBits& p, Range samples) {
  const int64_t words = words_for(p.K), used = ceil_div(p.K, kWordBits), out_words = words_for(p.rows * p.K);
  Words block[kWordBits];
  for (int64_t sample = samples.begin; sample < samples.end; ++sample) {
    uint64_t* own = p.out + sample * out_words;
    for (int64_t i = 0; i < out_words; ++i) own[i] = 0;
    for (int64_t first = 0; first < p.rows; first += kWordBits) {
      const int64_t some = smaller(kWordBits, p.rows - first);
      for (int64_t word = 0; word < used; word += kWordLanes) {
        const int64_t lanes = smaller<int64_t>(kWordLanes, used - word);
        for (int64_t r = 0; r < kWordBits; ++r) {
          block[r] = Words{};
          if (r < some)
            memcpy(&block[r], p.bits + (sample * p.rows + first + r) * words + word,
                   static_cast<size_t>(lanes) * sizeof(uint64_t));
        }
        transpose_64x64(block);
        for (int64_t lane = 0; lane < lanes; ++lane) {
          const int64_t unit = (word + lane) * kWordBits;
          for (int64_t i = 0; i < smaller(kWordBits, p.K - unit); ++i)
            put_bits(own, (unit + i) * p.rows + first, some, block[i][lane]);
        }
      }
    }
  }
}

}  // namespace engram::cpu::ENGRAM_ISA
