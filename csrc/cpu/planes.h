// Planes of a padded image, on which a tap of a convolution is a shift.
//
// The pixels whose padded row and column leave the same remainders by the strides form a plane, of `rows` rows of
// `pitch` pixels. Output pixel (y, x) has number y * pitch + x, and its tap (i, j) is the pixel of that number plus
// shift_of_tap in the plane plane_of_tap: neither depends on the pixel. Numbers with x >= out_width, between two rows
// of outputs, belong to no output.
#pragma once

#include <cstdint>

#include "core/window.h"

namespace engram::cpu {

struct Planes {
  int64_t rows, pitch, area;
  int64_t down, across;  // remainders of rows and columns that taps have: down * across planes
  int64_t out_numbers;   // output pixels and those between them
};

static inline int64_t remainders(int64_t kernel, int64_t stride, int64_t dilation) {
  int64_t a = stride, b = dilation;
  while (b != 0) {
    const int64_t rest = a % b;
    a = b, b = rest;
  }
  const int64_t period = stride / a;  // of the remainders of 0, dilation, 2 dilation, ..
  return kernel < period ? kernel : period;
}

// Pixels of an image along one axis that lie in plane number `plane`: first, first + stride, .., of which the first has
// place `at` in the plane.
struct PlanePixels {
  int64_t first, count, at;
};
static inline PlanePixels pixels_along(int64_t plane, int64_t size, int64_t before, int64_t stride, int64_t dilation) {
  const int64_t remainder = plane * dilation % stride, first = ((remainder - before) % stride + stride) % stride;
  return {first, first < size ? (size - first - 1) / stride + 1 : 0, (first + before) / stride};
}

static inline Planes planes_of(const Window& w) {
  const int64_t rows = ceil_div(w.height + w.top + w.bottom, w.stride_h);
  const int64_t columns = ceil_div(w.width + w.left + w.right, w.stride_w), out_w = out_width(w);
  const int64_t down = remainders(w.kernel_h, w.stride_h, w.dilation_h);
  const int64_t across = remainders(w.kernel_w, w.stride_w, w.dilation_w);
  int64_t common = columns;  // columns of padding on either side, which the end of a row shares with the next one
  for (int64_t j = 0; j < across; ++j) {
    const PlanePixels own = pixels_along(j, w.width, w.left, w.stride_w, w.dilation_w);
    const int64_t after = columns - own.at - own.count, least = own.at < after ? own.at : after;
    common = least < common ? least : common;
  }
  const int64_t pitch = columns - common < out_w ? out_w : columns - common;
  return {rows, pitch, rows * pitch + common, down, across, (out_height(w) - 1) * pitch + out_w};
}

static inline int64_t count(const Planes& p) { return p.down * p.across; }
static inline int64_t plane_of_tap(const Window& w, const Planes& p, int64_t tap) {
  return tap / w.kernel_w % p.down * p.across + tap % w.kernel_w % p.across;
}
static inline int64_t shift_of_tap(const Window& w, const Planes& p, int64_t tap) {
  return tap / w.kernel_w * w.dilation_h / w.stride_h * p.pitch + tap % w.kernel_w * w.dilation_w / w.stride_w;
}

// Calls f(plane, pixel of the image, place in the plane, pixels, from each of which the next is stride_w away) for
// every row of every plane.
template <typename F>
static inline void for_plane_rows(const Window& w, const Planes& p, const F& f) {
  for (int64_t i = 0; i < p.down; ++i)
    for (int64_t j = 0; j < p.across; ++j) {
      const PlanePixels rows = pixels_along(i, w.height, w.top, w.stride_h, w.dilation_h);
      const PlanePixels columns = pixels_along(j, w.width, w.left, w.stride_w, w.dilation_w);
      if (columns.count == 0) continue;
      for (int64_t row = 0; row < rows.count; ++row)
        f(i * p.across + j, (rows.first + row * w.stride_h) * w.width + columns.first,
          (rows.at + row) * p.pitch + columns.at, columns.count);
    }
}

// Without pixels between two rows of outputs, at the price of a plane for each column of taps: output pixel m has
// number m there, and its tap (i, j) is that of number m + tap_shift in the plane tap_plane, which has `rows` rows of
// out_width.
static inline int64_t tap_plane(const Window& w, const Planes& p, int64_t tap) {
  return tap / w.kernel_w % p.down * w.kernel_w + tap % w.kernel_w;
}
static inline int64_t tap_shift(const Window& w, int64_t tap) {
  return tap / w.kernel_w * w.dilation_h / w.stride_h * out_width(w);
}
// As for_plane_rows, for the pixels of these planes that lie in the image.
template <typename F>
static inline void for_tap_rows(const Window& w, const Planes& p, const F& f) {
  const int64_t out_w = out_width(w);
  for (int64_t i = 0; i < p.down; ++i) {
    const PlanePixels rows = pixels_along(i, w.height, w.top, w.stride_h, w.dilation_h);
    for (int64_t j = 0; j < w.kernel_w; ++j) {
      const int64_t start = j * w.dilation_w - w.left;  // of the tap of output column 0
      const int64_t first = start < 0 ? ceil_div(-start, w.stride_w) : 0;
      const int64_t past = start < w.width ? (w.width - start - 1) / w.stride_w + 1 : 0;
      const int64_t end = past < out_w ? past : out_w;
      if (first >= end) continue;
      for (int64_t row = 0; row < rows.count; ++row)
        f(i * w.kernel_w + j, (rows.first + row * w.stride_h) * w.width + start + first * w.stride_w,
          (rows.at + row) * out_w + first, end - first);
    }
  }
}

}  // namespace engram::cpu
