// Where the taps of a convolution lie, for every backend.
//
// A sample is one packed row of height * width * channels units, pixel by pixel, the channels of a pixel together. Tap
// (i, j) of output pixel (y, x) is input pixel (y * stride_h - top + i * dilation_h, x * stride_w - left + j *
// dilation_w); outside the image it is padding and counts nothing. An unfolded row holds the taps of one output pixel,
// row by row, and of each the channels of one group: group_units bits, tightly packed.
#pragma once

#include <cstdint>

#include "core/bits.h"

namespace engram {

struct Window {
  int64_t height, width, channels;
  int64_t kernel_h, kernel_w, stride_h, stride_w;
  int64_t top, bottom, left, right;  // padding
  int64_t dilation_h, dilation_w;
  int64_t groups;
};

ENGRAM_FUNCTION int64_t out_height(const Window& w) {
  return (w.height + w.top + w.bottom - w.dilation_h * (w.kernel_h - 1) - 1) / w.stride_h + 1;
}
ENGRAM_FUNCTION int64_t out_width(const Window& w) {
  return (w.width + w.left + w.right - w.dilation_w * (w.kernel_w - 1) - 1) / w.stride_w + 1;
}
ENGRAM_FUNCTION int64_t out_pixels(const Window& w) { return out_height(w) * out_width(w); }
ENGRAM_FUNCTION int64_t units(const Window& w) { return w.height * w.width * w.channels; }
ENGRAM_FUNCTION int64_t taps(const Window& w) { return w.kernel_h * w.kernel_w; }
ENGRAM_FUNCTION int64_t group_channels(const Window& w) { return w.channels / w.groups; }
ENGRAM_FUNCTION int64_t group_units(const Window& w) { return taps(w) * group_channels(w); }
ENGRAM_FUNCTION bool has_padding(const Window& w) { return (w.top | w.bottom | w.left | w.right) != 0; }

// The taps of an output pixel along one axis that lie in the image: [first, last), at `start + tap * dilation`.
struct Taps {
  int64_t start, first, last;
};
ENGRAM_FUNCTION Taps taps_inside(int64_t start, int64_t kernel, int64_t dilation, int64_t size) {
  if (start >= 0 && start + (kernel - 1) * dilation < size) return {start, 0, kernel};
  if (dilation == 0) return {start, 0, start >= 0 && start < size ? kernel : 0};
  const int64_t first = start < 0 ? ceil_div(-start, dilation) : 0;
  const int64_t last = start < size ? (size - start - 1) / dilation + 1 : 0;
  return {start, first < kernel ? first : kernel, last < kernel ? last : kernel};
}
ENGRAM_FUNCTION Taps taps_of_row(const Window& w, int64_t y) {
  return taps_inside(y * w.stride_h - w.top, w.kernel_h, w.dilation_h, w.height);
}
ENGRAM_FUNCTION Taps taps_of_column(const Window& w, int64_t x) {
  return taps_inside(x * w.stride_w - w.left, w.kernel_w, w.dilation_w, w.width);
}

// Output pixel m of all samples, and those after it.
struct Pixel {
  int64_t sample, y, x;
};
ENGRAM_FUNCTION Pixel pixel_of(const Window& w, int64_t m) {
  const int64_t out_h = out_height(w), out_w = out_width(w);
  return {m / (out_h * out_w), m / out_w % out_h, m % out_w};
}
ENGRAM_FUNCTION void advance(Pixel& p, int64_t out_h, int64_t out_w) {
  if (++p.x < out_w) return;
  p.x = 0;
  if (++p.y < out_h) return;
  p.y = 0;
  ++p.sample;
}

}  // namespace engram
