// Gradients of convolutions of bits, on planes (planes.h) and by look-ups (look_up.h).
//
//   conv2d_input_grad   dx[m + t, c] = scale sum_n d[m,n] s(W[n,t,c]), over the taps t of the output pixels m
//   channel_planes      bit m of a plane of channel c = s(x[m,c])
//   conv2d_weight_grad  sums[t,c][n] = sum_m d[m,n] g[c] s(x[m + t, c]), over the taps inside the image
//
// For dx a table holds sums over outputs of 16 output pixels side by side; what a filter looks up is added to the plane
// of its channel, shifted by its tap. For dw a table holds sums over 64 pixels of 16 outputs, and a shift of a plane of
// signs are the signs that a tap sees. So no tap is unfolded and no product is folded back. Pixels between two rows of
// outputs have gradient 0. Channels that no pixel of a sample recruits are passed over: both cost `rate` times as much
// with gates over channels. Both are bound by a load and an addition for 64 products.
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
  for (int64_t c = 0; c < own; ++c) {
    if (!has_bit(p.any, first_channel + c)) continue;
    for (int64_t tap = 0; tap < taps(w); ++tap) {
      const int64_t row = p.group * group_units(w) + tap * group_channels(w) + channels.begin + c;
      const int64_t plane = plane_of_tap(w, p.planes, tap) * own + c;
      p.columns[columns++] = {row * words, plane * p.plane_stride + shift_of_tap(w, p.planes, tap)};
    }
  }
  const auto add = [&](const SignColumn* column, const char* entries, int groups, int64_t word, int64_t m,
                       auto several) {
    constexpr int kColumns = decltype(several)::value;
    uint64_t signs[kColumns];
    Vector<float> acc[kColumns][kVectors];
    for (int i = 0; i < kColumns; ++i) signs[i] = p.w_t[column[i].signs + word];
    look_up_sums<float, kColumns, false>(entries, groups, signs, nullptr, acc);
    for (int i = 0; i < kColumns; ++i)
      for (int v = 0; v < kVectors; ++v) {
        auto* sum = reinterpret_cast<char*>(p.sums + column[i].sums + m) + v * kVectorBytes;
        store_vector<float>(sum, load_vector<float>(sum) + acc[i][v]);
      }
  };
  for (int64_t m = 0; m < p.planes.out_numbers; m += kTileNumbers)
    for (int64_t n = 0; n < N; n += kWordBits) {
      const int groups = static_cast<int>((smaller(kWordBits, N - n) + kSigns - 1) / kSigns);
      tabulate<float, false>(d + n * p.gradient_stride + m, p.gradient_stride, groups, table);
      int64_t i = 0;
      for (; i + kLookUpColumns <= columns; i += kLookUpColumns)
        add(p.columns + i, table, groups, n / kWordBits, m, std::integral_constant<int, kLookUpColumns>{});
      for (; i < columns; ++i) add(p.columns + i, table, groups, n / kWordBits, m, std::integral_constant<int, 1>{});
    }
  for (int64_t i = 0; i < count(p.planes) * own * p.plane_stride; ++i) p.sums[i] *= p.scale;
  for_plane_rows(w, p.planes, [&](int64_t plane, int64_t pixel, int64_t at, int64_t pixels) {
    float* dx = p.dx + (p.sample * w.height * w.width + pixel) * w.channels + first_channel;
    write_transposed(p.sums + plane * own * p.plane_stride + at, p.plane_stride, own, pixels, dx,
                     w.stride_w * w.channels);
  });
}

void channel_planes(const ChannelPlanes& p, Range samples) {
  const Window& w = p.window;
  Words block[kWordBits];
  for (int64_t sample = samples.begin; sample < samples.end; ++sample) {
    const uint64_t* bits = p.bits + sample * p.stride;
    uint64_t* own = p.planes_bits + sample * count(p.planes) * w.channels * p.words;
    memset(own, 0, static_cast<size_t>(count(p.planes) * w.channels * p.words) * sizeof(uint64_t));
    for_plane_rows(w, p.planes, [&](int64_t plane, int64_t pixel, int64_t at, int64_t pixels) {
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
            put_bits(own + (plane * w.channels + c + i) * p.words, at + first, some,
                     block[i % kWordBits][i / kWordBits]);
        }
      }
    });
  }
}

namespace {

// padded[tap] += the gradients (.., kGradTile) of a sample whose tap is padding.
void add_padded(const Window& w, const Planes& p, const float* d, float* padded) {
  const int64_t out_h = out_height(w), out_w = out_width(w);
  const auto add_pixel = [&](int64_t tap, int64_t y, int64_t x) {
    for (int64_t n = 0; n < kTileNumbers; ++n)
      padded[tap * kTileNumbers + n] += d[(y * p.pitch + x) * kTileNumbers + n];
  };
  for (int64_t y = 0; y < out_h; ++y) {
    const Taps rows = taps_of_row(w, y);
    const bool inside = rows.first == 0 && rows.last == w.kernel_h;
    for (int64_t x = 0; x < out_w; ++x) {
      const Taps columns = taps_of_column(w, x);
      if (inside && columns.first == 0 && columns.last == w.kernel_w) continue;
      for (int64_t i = 0; i < w.kernel_h; ++i)
        for (int64_t j = 0; j < w.kernel_w; ++j)
          if (i < rows.first || i >= rows.last || j < columns.first || j >= columns.last)
            add_pixel(i * w.kernel_w + j, y, x);
    }
  }
}

}  // namespace

void conv2d_weight_grad(const Conv2dWeightGrad& p, Range samples) {
  alignas(64) char table[kGroups * kEntries * kEntryBytes];
  const Window& w = p.window;
  const int64_t channels = group_channels(w), words = ceil_div(w.channels, kWordBits);
  const int64_t numbers = ceil_div(p.planes.out_numbers, kWordBits) * kWordBits;
  memset(p.gradient, 0, static_cast<size_t>(numbers * kTileNumbers) * sizeof(float));
  memset(p.sums, 0, static_cast<size_t>(group_units(w) * kTileNumbers) * sizeof(float));
  const auto add = [&](const SignColumn* column, int groups, int64_t m, auto several) {
    constexpr int kColumns = decltype(several)::value;
    uint64_t signs[kColumns];
    Vector<float> acc[kColumns][kVectors];
    for (int i = 0; i < kColumns; ++i) signs[i] = bits_at(p.planes_bits, column[i].signs + m, kWordBits);
    look_up_sums<float, kColumns, false>(table, groups, signs, nullptr, acc);
    for (int i = 0; i < kColumns; ++i)
      for (int v = 0; v < kVectors; ++v) {
        auto* sum = reinterpret_cast<char*>(p.sums + column[i].sums) + v * kVectorBytes;
        store_vector<float>(sum, load_vector<float>(sum) + acc[i][v]);
      }
  };
  for (int64_t sample = samples.begin; sample < samples.end; ++sample) {
    place_gradient(p.d, w, p.planes, sample, p.first, p.outputs, p.gradient, kTileNumbers, 1);
    memset(p.padded, 0, static_cast<size_t>(taps(w) * kTileNumbers) * sizeof(float));
    add_padded(w, p.planes, p.gradient, p.padded);
    int64_t columns = 0;
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t channel = p.group * channels + c;
      if (p.channels != nullptr && !has_bit(p.channels + (p.shared ? 0 : sample * words), channel)) continue;
      for (int64_t tap = 0; tap < taps(w); ++tap) {
        const int64_t plane = sample * count(p.planes) + plane_of_tap(w, p.planes, tap);
        const int64_t bit = (plane * w.channels + channel) * p.words * kWordBits + shift_of_tap(w, p.planes, tap);
        float* sum = p.sums + (tap * channels + c) * kTileNumbers;
        for (int64_t n = 0; n < kTileNumbers; ++n) sum[n] += p.padded[tap * kTileNumbers + n];
        p.columns[columns++] = {bit, (tap * channels + c) * kTileNumbers};
      }
    }
    for (int64_t m = 0; m < p.planes.out_numbers; m += kWordBits) {
      const int groups = static_cast<int>((smaller(kWordBits, p.planes.out_numbers - m) + kSigns - 1) / kSigns);
      tabulate<float, false>(p.gradient + m * kTileNumbers, kTileNumbers, groups, table);
      int64_t i = 0;
      for (; i + kLookUpColumns <= columns; i += kLookUpColumns)
        add(p.columns + i, groups, m, std::integral_constant<int, kLookUpColumns>{});
      for (; i < columns; ++i) add(p.columns + i, groups, m, std::integral_constant<int, 1>{});
    }
  }
}

void add_tiles(const AddTiles& p, Range tiles) {
  for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
    float* sums = p.sums + tile * p.parts * p.K * kTileNumbers;
    for (int64_t part = 1; part < p.parts; ++part)
      for (int64_t i = 0; i < p.K * kTileNumbers; ++i) sums[i] += sums[part * p.K * kTileNumbers + i];
    for (int64_t i = 0; i < p.K * kTileNumbers; ++i) sums[i] *= p.scale;
    const int64_t group = tile / p.tiles, first = tile % p.tiles * kTileNumbers;
    write_transposed(sums, kTileNumbers, p.K, smaller(kTileNumbers, p.outputs - first),
                     p.dw + (group * p.outputs + first) * p.K, p.K);
  }
}

}  // namespace engram::cpu::ENGRAM_ISA
