// Which numbers make a window, for all who read one: arguments of operators, files of the runtime.
#pragma once

#include <cstdint>
#include <string>

#include "core/window.h"

namespace engram {

struct WindowField {
  const char* name;
  int64_t Window::* number;
  int64_t least;
};
// In the order of reference.Window.
constexpr WindowField kWindowFields[] = {
    {"height", &Window::height, 1},         {"width", &Window::width, 1},
    {"channels", &Window::channels, 1},     {"kernel_h", &Window::kernel_h, 1},
    {"kernel_w", &Window::kernel_w, 1},     {"stride_h", &Window::stride_h, 1},
    {"stride_w", &Window::stride_w, 1},     {"top", &Window::top, 0},
    {"bottom", &Window::bottom, 0},         {"left", &Window::left, 0},
    {"right", &Window::right, 0},           {"dilation_h", &Window::dilation_h, 0},
    {"dilation_w", &Window::dilation_w, 0}, {"groups", &Window::groups, 1},
};

// What is wrong with the numbers of a window, as "expected ..., got ..."; empty where nothing is.
inline std::string window_fault(const Window& w, int64_t least_dilation = 1) {
  const auto fault = [](const std::string& expected, const std::string& got) {
    return "expected " + expected + ", got " + got;
  };
  for (const WindowField& field : kWindowFields) {
    const bool dilates = field.number == &Window::dilation_h || field.number == &Window::dilation_w;
    const int64_t least = dilates ? least_dilation : field.least, number = w.*field.number;
    if (number < least || number > INT32_MAX)
      return fault(std::to_string(least) + " to 2^31 - 1 as " + field.name, std::to_string(number));
  }
  if (w.channels % w.groups != 0)
    return fault("a number of groups that divides " + std::to_string(w.channels) + " channels",
                 std::to_string(w.groups));
  const auto too_many = [&fault](const char* what, int64_t a, int64_t b, int64_t c) {
    int64_t product = 0;
    const bool fits = !__builtin_mul_overflow(a, b, &product) && !__builtin_mul_overflow(product, c, &product) &&
                      product <= INT32_MAX;
    return fits ? std::string()
                : fault(std::string("at most 2^31 - 1 ") + what,
                        std::to_string(a) + " x " + std::to_string(b) + " x " + std::to_string(c));
  };
  const auto too_large = [&fault](const char* axis, int64_t padded, int64_t dilation, int64_t kernel) {
    const int64_t reach = dilation * (kernel - 1);
    return padded > reach
               ? std::string()
               : fault(std::string("a kernel that fits into the padded ") + axis + " " + std::to_string(padded),
                       "one of " + std::to_string(reach + 1));
  };
  std::string found = too_many("units of a sample", w.height, w.width, w.channels);
  if (found.empty()) found = too_many("units of a kernel", w.kernel_h, w.kernel_w, w.channels / w.groups);
  if (found.empty()) found = too_large("height", w.height + w.top + w.bottom, w.dilation_h, w.kernel_h);
  if (found.empty()) found = too_large("width", w.width + w.left + w.right, w.dilation_w, w.kernel_w);
  if (found.empty()) found = too_many("output pixels of a sample", out_height(w), out_width(w), 1);
  if (found.empty())
    found = too_many("padded pixels of a sample", w.height + w.top + w.bottom, w.width + w.left + w.right, 1);
  return found;
}

}  // namespace engram
