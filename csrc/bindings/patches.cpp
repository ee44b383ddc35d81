// Random filters at places of images. On the CPU alone.
#include <torch/csrc/stable/library.h>

#include "bindings/tensors.h"

namespace engram::bindings {

namespace {

Tensor patch_excitability(const Tensor& images, const Tensor& filters, const Tensor& units, double floor,
                          int64_t pool) {
  constexpr int64_t kMostSize = 128;
  const Place place = place_of("images", images);
  require(images.scalar_type() == ScalarType::Byte && images.dim() == 4 && images.size(1) >= 1 && images.size(2) >= 1 &&
              images.size(3) >= 1,
          "images: expected uint8 (M, height, width, channels), got ", describe(images));
  check_place("filters", filters, place);
  require(filters.scalar_type() == ScalarType::Char && filters.dim() == 3 && filters.size(0) >= 1 &&
              filters.size(0) <= INT32_MAX && filters.size(1) == filters.size(2) && filters.size(1) >= 1 &&
              filters.size(1) <= kMostSize,
          "filters: expected int8 (filters, size, size) of 1 to ", kMostSize, " pixels, got ", describe(filters));
  check_place("units", units, place);
  require(units.scalar_type() == ScalarType::Long && units.dim() == 1 && units.size(0) <= INT32_MAX,
          "units: expected int64 (N,) of at most 2^31 - 1, got ", describe(units));
  require(floor >= 1e-30 && floor <= 1e30, "floor: expected 1e-30 to 1e30, got ", floor);
  const int64_t M = images.size(0), height = images.size(1), width = images.size(2), channels = images.size(3);
  const int64_t F = filters.size(0), size = filters.size(1), least = height < width ? height : width;
  require(pool >= 1 && pool <= INT32_MAX, "pool: expected 1 to 2^31 - 1, got ", pool);
  require(size + pool - 1 <= least, "filters: expected at most ", least - pool + 1, " pixels for images of ", height,
          " x ", width, " and a pool of ", pool, ", got ", size);
  const Tensor x = as_contiguous(images), w = as_contiguous(filters), chosen = as_contiguous(units);
  const auto* taps = static_cast<const int8_t*>(w.const_data_ptr());
  for (int64_t i = 0; i < F * size * size; ++i)
    require(taps[i] >= -1 && taps[i] <= 1, "filters: expected -1, 0 and 1, got ", static_cast<int>(taps[i]));
  const auto* numbers = static_cast<const int64_t*>(chosen.const_data_ptr());
  const int64_t N = chosen.size(0), all = (height - size - pool + 2) * (width - size - pool + 2) * channels * F;
  for (int64_t n = 0; n < N; ++n)
    require(numbers[n] >= (n == 0 ? 0 : numbers[n - 1]) && numbers[n] < all,
            "units: expected rising numbers from 0 to ", all - 1, ", got ", numbers[n], " at ", n);
  Tensor z = new_tensor({M, N}, ScalarType::Float, place);
  TorchRuntime rt;
  cpu::patch_excitability(rt.get(), {static_cast<const uint8_t*>(x.const_data_ptr()), M, height, width, channels, taps,
                                     F, size, numbers, N, pool, static_cast<float>(floor), data<float>(z)});
  return z;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(engram_kernels, CPU, m) { m.impl("patch_excitability", TORCH_BOX(&patch_excitability)); }

}  // namespace engram::bindings
