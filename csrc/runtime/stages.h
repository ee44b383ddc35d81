// What the layers of a packed network do to a batch, as docs/packed-format.md defines them. Each stage points to what
// others own: tensors of a file here, tensors of torch in bindings/packed.cpp.
#pragma once

#include <cstdint>
#include <functional>
#include <variant>

#include "core/window.h"
#include "cpu/launch.h"
#include "runtime/workspace.h"

namespace engram::runtime {

enum class Type { kFloat32, kInt32, kUint8 };

// Numbers of a batch, (samples, units).
struct Values {
  const void* data;  // null where there are none: after a maximum
  Type type;
  int64_t units;
  int64_t largest;  // magnitude that integers may have
};

// What layers read and write. Signs and gate are of as many units as the values.
struct State {
  int64_t samples;
  Values y;
  const uint64_t* bits;
  const uint64_t* gate;
  int64_t gate_stride;  // in words, 0 for one gate of all samples
};

// Threads and memory of a call.
struct Call {
  cpu::Runtime kernels;
  Workspace& memory;
  void* values;  // for the values that stages write: 4 bytes a sample and unit of the widest
};

struct Product {
  int64_t inputs, outputs;
  bool real;
  const uint64_t* weight;
  const uint16_t* groups;  // of `weight`, or null: GroupedProduct

  int64_t steps() const;
  void run(State& state, const Call& call) const;
};

// Images lie pixel by pixel, the channels of a pixel together (core/window.h), values as signs.
struct Convolution {
  Window window;  // of one group where it is real
  int64_t outputs;
  bool real;
  const uint64_t* weight;  // [outputs, words_for(group_units)]
  const uint16_t* groups;  // as in Product

  int64_t units() const { return out_pixels(window) * outputs; }
  int64_t steps() const;
  void run(State& state, const Call& call) const;

 private:
  void run_real(const State& state, bool exact, const Call& call) const;
};

// The largest sign that a pixel sees, of each channel.
struct MaxPool {
  Window window;
  const uint64_t* flip_bits;  // [words_for(units())] signs that change after that, or null

  int64_t units() const { return out_pixels(window) * window.channels; }
  int64_t steps() const { return out_pixels(window) * taps(window) * ceil_div(window.channels, kWordBits); }
  void run(State& state, const Call& call) const;
};

// y[c rows + r] = y[r columns + c]: between images whose channels come first and images pixel by pixel.
struct Transpose {
  int64_t rows, columns;

  int64_t steps() const { return rows * columns; }
  void run(State& state, const Call& call) const;
};

// Thresholds come again every `period` units, which is all units or a multiple of 128 that divides them.
struct Sign {
  int64_t units, period;
  bool by_mean;               // of all units
  const int32_t* threshold;   // [period] of integers
  const float* real;          // [period] of float32, null where `threshold` is meant
  const uint64_t* flip_bits;  // packed, null for none

  int64_t steps() const { return units; }
  void run(State& state, const Call& call) const;

 private:
  void pack_floats(const float* y, int64_t rows, uint64_t* bits) const;
};

enum class Score { kValue, kMagnitude, kStandardised, kDistance };
struct Recruit {
  int64_t units, count;
  Score score;

  int64_t steps() const { return units; }
  void run(State& state, const Call& call) const;

 private:
  bool has_sign() const { return score == Score::kValue || score == Score::kStandardised; }
  const float* scores(const State& state, const Call& call) const;
  const int32_t* integer_keys(const int32_t* y, int64_t samples, const Call& call) const;
};

struct Gate {
  int64_t units;
  const uint64_t* gate;

  int64_t steps() const { return 0; }
  void run(State& state, const Call&) const { state.gate = gate, state.gate_stride = 0; }
};

struct Affine {
  int64_t units;
  const float* factors;
  int64_t factor_count;
  const float *scale, *shift;  // null for none

  int64_t steps() const { return units; }
  void run(State& state, const Call& call) const;
};

struct Dendritic {
  int64_t inputs, classes, segments, top_segments, recruited;
  const uint64_t* weight;
  const float* mean_product;  // [classes * segments] rate times the sum of a segment's signs

  int64_t steps() const;
  void run(State& state, const Call& call) const;
};

struct Prototype {
  int64_t inputs, classes, recruited;
  const uint64_t* bits;
  const float* offset;
  const int64_t* samples;

  int64_t steps() const;
  void run(State& state, const Call& call) const;
};

struct Ridge {
  int64_t inputs, classes;
  const float *weight, *bias;
  const float* weight_sums;  // [classes]
  const int64_t* samples;

  int64_t steps() const { return inputs * classes; }
  void run(State& state, const Call& call) const;
};

using Stage =
    std::variant<Product, Convolution, MaxPool, Transpose, Sign, Recruit, Gate, Affine, Dendritic, Prototype, Ridge>;

// The period of the thresholds of `channels` on images of so many units.
int64_t threshold_period(int64_t channels, int64_t units);

// Values of a batch as float32, which holds all that occur exactly: sums of up to 2^24 signs, and bytes.
const float* as_floats(const State& state, const Call& call);

// The mean of float32 values, summed in their order.
double mean_of(const float* y, int64_t units);

// Calls `run` on parts of the samples [0, samples), each with a thread and memory of its own; where samples are too few
// the kernels of one part share their outputs out instead. `steps` a sample are as Stage's, `units` those of the widest
// values. What `run` throws is thrown here.
void share_samples(const cpu::Runtime& runtime, int64_t samples, int64_t steps, int64_t units,
                   const std::function<void(int64_t begin, int64_t count, const Call&)>& run);

}  // namespace engram::runtime
