// Gradients of convolutions of bits, on planes (planes.h) and by look-ups (look_up.h).
//
//   conv2d_input_grad   dx[m + t, c] = scale sum_n d[m,n] s(W[n,t,c]), over the taps t of the output pixels m
//   tap_planes          bit m of the plane of a column of taps and channel c = s(x[m + t, c]) of the first tap t of it
//   conv2d_weight_grad  sums[t,c][n] = sum_m d[m,n] g[c] s(x[m + t, c]), over the taps inside the image
//
// For dx a table holds sums over outputs of 16 output pixels side by side; what a filter looks up is added to the plane
// of its channel, shifted by its tap. Pixels between two rows of outputs have gradient 0. For dw a table holds sums
// over 64 pixels of 16 outputs, and a shift of a plane of signs are the signs that a tap sees. So no product is folded
// back. Channels that no pixel of a sample recruits are passed over: with gates over channels both cost `rate` times as
// much. Both are bound by a load and an addition for 64 products. The sign of a padded tap counts as -1 in dw, and
// add_padded takes that back.
#include <cstring>
#include <type_traits>

#include "cpu/bit_runs.h"
#include "cpu/look_up.h"
#include "cpu/tables.h"

namespace engram::cpu::ENGRAM_ISA {

namespace {

constexpr int64_t kTileNumbers = kTile<float>;
static_assert(kTileNumbers == kGradTile, "the launcher sizes the memory");

// out[(y * pitch + x) * out_pixel + n * out_output] = d[y, x, first + n] of a sample, n < outputs. One of the strides
// of d is 1, and one of those of `out`.
void place_gradient(const OutputGrad& d, const Window& w, const Planes& p, int64_t sample, int64_t first,
                    int64_t outputs, float* out, int64_t out_pixel, int64_t out_output) {
  const int64_t out_h = out_height(w), out_w = out_width(w);
  for (int64_t y = 0; y < out_h; ++y) {
    const float* from = d.data + sample * d.sample + y * out_w * d.pixel + first * d.output;
    float* to = out + y * p.pitch * out_pixel;
    if (d.output == 1 && out_output == 1) {
      for (int64_t x = 0; x < out_w; ++x)
        for (int64_t n = 0; n < outputs; ++n) to[x * out_pixel + n] = from[x * d.pixel + n];
    } else if (d.output == 1) {
      write_transposed(from, d.pixel, out_w, outputs, to, out_output);
    } else if (out_pixel == 1) {
      for (int64_t n = 0; n < outputs; ++n) memcpy(to + n * out_output, from + n * d.output, sizeof(float) * out_w);
    } else {
      write_transposed(from, d.output, outputs, out_w, to, out_pixel);
    }
  }
}

void scale_all(float* y, int64_t elements, float scale) {
  if (scale == 1.0f) return;
  for (int64_t i = 0; i < elements; ++i) y[i] *= scale;
}

// sum[n] += terms[n] of a tile
ENGRAM_INLINE void add_tile(const float* terms, float* sum) {
  for (int n = 0; n < kTileNumbers; n += kLanes) store(sum + n, add(load(sum + n), load(terms + n)));
}

ENGRAM_INLINE bool has_bit(const uint64_t* bits, int64_t i) { return bits[i / kWordBits] >> (i % kWordBits) & 1; }

}  // namespace

bool channels_of_pixels(const ChannelsOfPixels& p, Range samples) {
  const int64_t words = ceil_div(p.channels, kWordBits);
  uint64_t differ = 0;
  for (int64_t sample = samples.begin; sample < samples.end; ++sample) {
    const uint64_t* bits = p.bits + sample * p.stride;
    uint64_t* any = p.any + sample * words;
    for (int64_t word = 0; word < words; ++word) {
      const int64_t first = word * kWordBits, some = smaller(kWordBits, p.channels - first);
      uint64_t either = 0, both = ~uint64_t{0};
      for (int64_t pixel = 0; pixel < p.pixels; ++pixel) {
        const uint64_t own = bits_at(bits, pixel * p.channels + first, some);
        either |= own, both &= own;
      }
      any[word] = either;
      differ |= either ^ (both & valid_bits(0, some));
    }
  }
  return differ != 0;
}

void conv2d_input_grad(const Conv2dInputGrad& p, Range channels) {
  alignas(64) char table[kGroups * kEntries * kEntryBytes];
  const Window& w = p.window;
  const int64_t own = channels.end - channels.begin, N = p.outputs, words = words_for(N), group_first = p.group * N;
  const int64_t first_channel = p.group * group_channels(w) + channels.begin;
  float* d = p.gradient;
  const int64_t rows = ceil_div(N, kSigns) * kSigns;  // of whole groups of terms
  memset(d, 0, static_cast<size_t>(rows * p.gradient_stride) * sizeof(float));
  place_gradient(p.d, w, p.planes, p.sample, group_first, N, d, 1, p.gradient_stride);
  memset(p.sums, 0, static_cast<size_t>(count(p.planes) * own * p.plane_stride) * sizeof(float));
  int64_t columns = 0;
  // One tap after the other: two taps of a channel add to overlapping sums, and the second would wait for the first.
  for (int64_t tap = 0; tap < taps(w); ++tap) {
    const int64_t row = p.group * group_units(w) + tap * group_channels(w) + channels.begin;
    const int64_t plane = plane_of_tap(w, p.planes, tap) * own, shift = shift_of_tap(w, p.planes, tap);
    for (int64_t c = 0; c < own; ++c)
      if (has_bit(p.any, first_channel + c))
        p.columns[columns++] = {(row + c) * words, (plane + c) * p.plane_stride + shift};
  }
  const int64_t last = (N - 1) / kWordBits;
  // What a tile looks up in the tables of all outputs is added to the planes once.
  const auto add = [&](int64_t i, int groups, int64_t word, int64_t m, auto several) {
    constexpr int kColumns = decltype(several)::value;
    const SignColumn* column = p.columns + i;
    uint64_t signs[kColumns];
    Vector<float> acc[kColumns][kVectors];
    for (int c = 0; c < kColumns; ++c) signs[c] = p.w_t[column[c].signs + word];
    look_up_sums<float, kColumns, false>(table, groups, signs, nullptr, acc);
    for (int c = 0; c < kColumns; ++c)
      for (int v = 0; v < kVectors; ++v) {
        auto* tile = reinterpret_cast<char*>(p.tile + (i + c) * kTileNumbers) + v * kVectorBytes;
        if (word > 0) acc[c][v] += load_vector<float>(tile);
        auto* sum = reinterpret_cast<char*>(p.sums + column[c].sums + m) + v * kVectorBytes;
        if (word < last)
          store_vector<float>(tile, acc[c][v]);
        else
          store_vector<float>(sum, load_vector<float>(sum) + acc[c][v]);
      }
  };
  for (int64_t m = 0; m < p.planes.out_numbers; m += kTileNumbers)
    for (int64_t word = 0; word <= last; ++word) {
      const int64_t n = word * kWordBits;
      const int groups = static_cast<int>((smaller(kWordBits, N - n) + kSigns - 1) / kSigns);
      tabulate<float, false>(d + n * p.gradient_stride + m, p.gradient_stride, groups, table);
      int64_t i = 0;
      for (; i + kLookUpColumns <= columns; i += kLookUpColumns)
        add(i, groups, word, m, std::integral_constant<int, kLookUpColumns>{});
      for (; i < columns; ++i) add(i, groups, word, m, std::integral_constant<int, 1>{});
    }
  scale_all(p.sums, count(p.planes) * own * p.plane_stride, p.scale);
  for_plane_rows(w, p.planes, [&](int64_t plane, int64_t pixel, int64_t at, int64_t pixels) {
    float* dx = p.dx + (p.sample * w.height * w.width + pixel) * w.channels + first_channel;
    write_transposed(p.sums + plane * own * p.plane_stride + at, p.plane_stride, own, pixels, dx,
                     w.stride_w * w.channels);
  });
}

void tap_planes(const TapPlanes& p, Range samples) {
  const Window& w = p.window;
  const int64_t stride = p.words * w.channels;
  Words block[kWordBits];
  for (int64_t sample = samples.begin; sample < samples.end; ++sample) {
    const uint64_t* bits = p.bits + sample * p.stride;
    uint64_t* own = p.planes_bits + sample * p.planes.down * w.kernel_w * stride;
    memset(own, 0, static_cast<size_t>(p.planes.down * w.kernel_w * stride) * sizeof(uint64_t));
    for_tap_rows(w, p.planes, [&](int64_t plane, int64_t pixel, int64_t at, int64_t pixels) {
      uint64_t* to = own + plane * stride;
      for (int64_t first = 0; first < pixels; first += kWordBits) {
        const int64_t some = smaller(kWordBits, pixels - first);
        for (int64_t c = 0; c < w.channels; c += kWordLanes * kWordBits) {
          memset(block, 0, sizeof block);
          const int64_t lanes = smaller<int64_t>(kWordLanes, ceil_div(w.channels - c, kWordBits));
          for (int64_t i = 0; i < some; ++i)
            for (int64_t lane = 0; lane < lanes; ++lane) {
              const int64_t channel = c + lane * kWordBits;
              block[i][lane] = bits_at(bits, (pixel + (first + i) * w.stride_w) * w.channels + channel,
                                       smaller(kWordBits, w.channels - channel));
            }
          transpose_64x64(block);
          for (int64_t i = 0; i < smaller(kWordLanes * kWordBits, w.channels - c); ++i)
            put_bits(to + (c + i) * p.words, at + first, some, block[i % kWordBits][i / kWordBits]);
        }
      }
    });
  }
}

namespace {

// out[m][n] = d[m, first + n] for pixels m of a sample
void copy_gradient(const OutputGrad& d, int64_t sample, Range pixels, int64_t first, int64_t outputs, float* out) {
  const float* from = d.data + sample * d.sample + pixels.begin * d.pixel + first * d.output;
  const int64_t some = pixels.end - pixels.begin;
  if (d.output != 1) return write_transposed(from, d.output, outputs, some, out, kTileNumbers);
  if (outputs == kTileNumbers) {
    for (int64_t m = 0; m < some; ++m) memcpy(out + m * kTileNumbers, from + m * d.pixel, kEntryBytes);
    return;
  }
  for (int64_t m = 0; m < some; ++m)
    for (int64_t n = 0; n < outputs; ++n) out[m * kTileNumbers + n] = from[m * d.pixel + n];
}

// padded[tap] = the sum of the gradients of the pixels whose tap is padding
void add_padded(const Window& w, Range pixels, const float* d, float* padded) {
  memset(padded, 0, static_cast<size_t>(taps(w) * kTileNumbers) * sizeof(float));
  const int64_t out_h = out_height(w), out_w = out_width(w);
  Pixel pixel = pixel_of(w, pixels.begin);
  for (int64_t m = pixels.begin; m < pixels.end; ++m, advance(pixel, out_h, out_w), d += kTileNumbers) {
    const Taps rows = taps_of_row(w, pixel.y), columns = taps_of_column(w, pixel.x);
    if (rows.last - rows.first == w.kernel_h && columns.last - columns.first == w.kernel_w) continue;
    for (int64_t i = 0; i < w.kernel_h; ++i)
      for (int64_t j = 0; j < w.kernel_w; ++j) {
        if (i >= rows.first && i < rows.last && j >= columns.first && j < columns.last) continue;
        float* sum = padded + (i * w.kernel_w + j) * kTileNumbers;
        add_tile(d, sum);
      }
  }
}

}  // namespace

void conv2d_weight_grad(const Conv2dWeightGrad& p, Range samples) {
  alignas(64) char table[kGroups * kEntries * kEntryBytes];
  const Window& w = p.window;
  const int64_t channels = group_channels(w), K = group_units(w), words = ceil_div(w.channels, kWordBits);
  const int64_t tiles = ceil_div(p.outputs, kTileNumbers);
  memset(p.gradient, 0, static_cast<size_t>(kGradPixels * kTileNumbers) * sizeof(float));
  memset(p.sums, 0, static_cast<size_t>(tiles * K * kTileNumbers) * sizeof(float));
  const auto add = [&](const uint64_t* signs, const int64_t* places, float* sums, int groups, auto several) {
    constexpr int kColumns = decltype(several)::value;
    Vector<float> acc[kColumns][kVectors];
    look_up_sums<float, kColumns, false>(table, groups, signs, nullptr, acc);
    for (int i = 0; i < kColumns; ++i)
      for (int v = 0; v < kVectors; ++v) {
        auto* sum = reinterpret_cast<char*>(sums + places[i]) + v * kVectorBytes;
        store_vector<float>(sum, load_vector<float>(sum) + acc[i][v]);
      }
  };
  for (int64_t sample = samples.begin; sample < samples.end; ++sample) {
    const uint64_t* planes = p.planes_bits + sample * p.planes.down * w.kernel_w * w.channels * p.words;
    int64_t recruited = 0;  // channels, of each tap in turn
    for (int64_t c = 0; c < channels; ++c)
      if (p.channels == nullptr || has_bit(p.channels + (p.shared ? 0 : sample * words), p.group * channels + c))
        p.places[recruited++] = c * kTileNumbers;
    const int64_t columns = taps(w) * recruited;
    for (int64_t i = recruited; i < columns; ++i) p.places[i] = p.places[i - recruited] + channels * kTileNumbers;
    for (int64_t first = 0; first < out_pixels(w); first += kGradPixels) {
      const Range pixels{first, smaller(first + kGradPixels, out_pixels(w))};
      const int64_t blocks = ceil_div(pixels.end - pixels.begin, kWordBits);
      for (int64_t tap = 0; tap < taps(w); ++tap) {
        const uint64_t* plane = planes + (tap_plane(w, p.planes, tap) * w.channels + p.group * channels) * p.words;
        const int64_t bit = first + tap_shift(w, tap);
        for (int64_t i = 0; i < recruited; ++i) {
          const uint64_t* own = plane + p.places[i] / kTileNumbers * p.words;
          uint64_t* signs = p.signs + tap * recruited + i;
          for (int64_t block = 0; block < blocks; ++block)
            signs[block * columns] = bits_at(own, bit + block * kWordBits, kWordBits);
        }
      }
      for (int64_t tile = 0; tile < tiles; ++tile) {
        float* sums = p.sums + tile * K * kTileNumbers;
        const int64_t n = tile * kTileNumbers;
        copy_gradient(p.d, sample, pixels, p.first + n, smaller(kTileNumbers, p.outputs - n), p.gradient);
        if (p.pads) {
          add_padded(w, pixels, p.gradient, p.padded);
          for (int64_t tap = 0; tap < taps(w); ++tap)
            for (int64_t i = tap * recruited; i < (tap + 1) * recruited; ++i)
              add_tile(p.padded + tap * kTileNumbers, sums + p.places[i]);
        }
        for (int64_t block = 0; block < blocks; ++block) {
          const int64_t left = pixels.end - pixels.begin - block * kWordBits;
          const int groups = static_cast<int>((smaller(kWordBits, left) + kSigns - 1) / kSigns);
          float* terms = p.gradient + block * kWordBits * kTileNumbers;
          if (left < kWordBits)  // a group may end past the last pixel
            memset(terms + left * kTileNumbers, 0, static_cast<size_t>(kWordBits - left) * kEntryBytes);
          tabulate<float, false>(terms, kTileNumbers, groups, table);
          const uint64_t* signs = p.signs + block * columns;
          int64_t i = 0;
          for (; i + kLookUpColumns <= columns; i += kLookUpColumns)
            add(signs + i, p.places + i, sums, groups, std::integral_constant<int, kLookUpColumns>{});
          for (; i < columns; ++i) add(signs + i, p.places + i, sums, groups, std::integral_constant<int, 1>{});
        }
      }
    }
  }
}

void add_parts(const AddParts& p, Range blocks) {
  for (int64_t block = blocks.begin; block < blocks.end; ++block) {
    const int64_t group = block / p.blocks, size = p.stride / kTileNumbers / p.K * kTileNumbers;
    const int64_t first = block % p.blocks * size, outputs = smaller(size, p.outputs - first);
    float* sums = p.sums + block * p.parts * p.stride;
    for (int64_t n = 0; n < outputs; n += kTileNumbers, sums += p.K * kTileNumbers) {
      for (int64_t part = 1; part < p.parts; ++part)
        for (int64_t k = 0; k < p.K; ++k) add_tile(sums + part * p.stride + k * kTileNumbers, sums + k * kTileNumbers);
      scale_all(sums, p.K * kTileNumbers, p.scale);
      write_transposed(sums, kTileNumbers, p.K, smaller(kTileNumbers, outputs - n),
                       p.dw + (group * p.outputs + first + n) * p.K, p.K);
    }
  }
}

}  // namespace engram::cpu::ENGRAM_ISA
