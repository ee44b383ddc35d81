// What bounds binary_matmul: its primitives of cpu/simd.h on registers alone, without loads, broadcasts or stores.
//
//   per step and accumulator   partial = add_count(partial, count(differ(x, w)))
//   every kCountSteps          total = add_wide(total, widen(partial))
//
// A gate takes the place of the exclusive or, or joins it, in one instruction: it has the same bound.
// `in_order` tells the compiler that a register may hold something new, at no instruction: without it the one distance
// would be computed once. The result is the number of differing bits, which the caller knows. Not for plain C++, where
// the compiler itself chooses the vectors and the loop below would keep it from doing so.
#include "cpu/simd.h"

namespace engram::cpu::ENGRAM_ISA {

namespace {

// Each waits for its last addition, one cycle, while the others take their turn; with more, AVX2 runs out of registers.
constexpr int kAccumulators = 4;

int64_t distance(uint64_t x_word, uint64_t w_word, int64_t steps) {
  Bits x = bits_all(x_word), w = bits_all(w_word), total = bits_zero();
  for (int64_t first = 0; first < steps;) {
    const int64_t last = smaller(steps, first + kCountSteps);
    Bits partial[kAccumulators];
    for (int a = 0; a < kAccumulators; ++a) partial[a] = bits_zero();
    for (int64_t i = first; i < last; ++i) {
#pragma GCC unroll 4
      for (int a = 0; a < kAccumulators; ++a) {
        in_order(w);
        partial[a] = add_count(partial[a], count(differ(x, w)));
        in_order(partial[a]);
      }
    }
    for (int a = 0; a < kAccumulators; ++a) total = add_wide(total, widen(partial[a]));
    first = last;
  }
  return bits_total(total);
}

}  // namespace

}  // namespace engram::cpu::ENGRAM_ISA

extern "C" __attribute__((visibility("default"))) int64_t bits_per_step() {
  using namespace engram::cpu::ENGRAM_ISA;
  return int64_t{64} * kBitLanes * kAccumulators;
}

extern "C" __attribute__((visibility("default"))) int64_t distance_of(uint64_t x, uint64_t w, int64_t steps) {
  return engram::cpu::ENGRAM_ISA::distance(x, w, steps);
}
