// The launchers of self_test.cuh for test_emulator.py.
#include "self_test.cuh"

#define ENGRAM_EXPORT extern "C" __attribute__((visibility("default"))) int

using namespace engram::cuda::self_test;

ENGRAM_EXPORT run_positions(int32_t* out, int64_t gx, int64_t gy, int64_t gz, int64_t bx, int64_t by, int64_t bz) {
  const auto dimensions = [](int64_t x, int64_t y, int64_t z) {
    return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
  };
  return launch_positions(out, dimensions(gx, gy, gz), dimensions(bx, by, bz), nullptr);
}
ENGRAM_EXPORT run_integer_functions(const uint32_t* a, const uint32_t* b, uint32_t* out, int64_t n) {
  return launch_integer_functions(a, b, out, static_cast<int>(n), nullptr);
}
ENGRAM_EXPORT run_float_functions(const float* a, const float* b, float* out, int64_t n) {
  return launch_float_functions(a, b, out, static_cast<int>(n), nullptr);
}
ENGRAM_EXPORT run_shuffles(const int32_t* values, const int32_t* lanes, int32_t* out, int64_t argument, int64_t width) {
  return launch_shuffles(values, lanes, out, static_cast<int>(argument), static_cast<int>(width), nullptr);
}
ENGRAM_EXPORT run_votes(const int32_t* values, int32_t* out) { return launch_votes(values, out, nullptr); }
ENGRAM_EXPORT run_barriers(const int32_t* values, int32_t* out, int64_t rounds, int64_t threads) {
  return launch_barriers(values, out, static_cast<int>(rounds), static_cast<int>(threads), nullptr);
}
ENGRAM_EXPORT run_atomics(const uint32_t* values, int64_t n, int32_t* counts, uint32_t* results) {
  return launch_atomics(values, static_cast<int>(n), counts, results, nullptr);
}
ENGRAM_EXPORT run_load_matrices(const uint4* rows, const int32_t* places, uint32_t* out) {
  return launch_load_matrices(rows, places, out, nullptr);
}
ENGRAM_EXPORT run_product(int64_t product, const uint32_t* a, const uint32_t* b, void* c) {
  return launch_product(static_cast<Product>(product), a, b, c, nullptr);
}
ENGRAM_EXPORT run_copies(const uint4* in, uint4* out, int64_t rows, int64_t valid) {
  return launch_copies(in, out, static_cast<int>(rows), static_cast<int>(valid), nullptr);
}
ENGRAM_EXPORT run_differences(const uint64_t* x, const uint64_t* w, int32_t* y, int64_t M, int64_t N, int32_t* flag) {
  return launch_differences(x, w, y, static_cast<int>(M), static_cast<int>(N), flag, nullptr);
}
ENGRAM_EXPORT run_faulty(int64_t fault, const int32_t* x, int32_t* y, int64_t n) {
  return launch_faulty(static_cast<Fault>(fault), x, y, static_cast<int>(n), 0, nullptr);
}
