#include "runtime/stages.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <exception>
#include <limits>
#include <mutex>
#include <numeric>

#include "core/bits.h"
#include "cpu/float_mode.h"
#include "runtime/error.h"

namespace engram::runtime {
namespace {

constexpr int64_t kMostExact = int64_t{1} << 24;                     // integers up to here are exact in float32
constexpr float kNoClass = -std::numeric_limits<float>::infinity();  // score of a class without samples

const int32_t* as_integers(const State& state, const Call& call) {
  if (state.y.type == Type::kInt32) return static_cast<const int32_t*>(state.y.data);
  int32_t* out = call.memory.get<int32_t>(state.samples * state.y.units);
  std::copy_n(static_cast<const uint8_t*>(state.y.data), state.samples * state.y.units, out);
  return out;
}

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0 ? 1 : 0); }

// As engram_kernels.ExactLayerNorm rounds, which makes close values equal ones.
void standardise(float* y, int64_t units) {
  const double mean = mean_of(y, units);
  const auto high = static_cast<float>(mean), low = static_cast<float>(mean - high);
  double squares = 0;
  for (int64_t n = 0; n < units; ++n) {
    y[n] = (y[n] - high) - low;
    squares += static_cast<double>(y[n]) * static_cast<double>(y[n]);
  }
  const auto variance = static_cast<float>(squares / static_cast<double>(units));
  const float reciprocal = 1.0f / std::sqrt(variance + 1e-5f);
  for (int64_t n = 0; n < units; ++n) y[n] *= reciprocal;
}

// The gates of all samples, one each.
const uint64_t* own_gates(const State& state, int64_t words, const Call& call) {
  if (state.gate_stride != 0) return state.gate;
  auto* out = call.memory.get<uint64_t>(state.samples * words);
  for (int64_t i = 0; i < state.samples; ++i) std::copy_n(state.gate, words, out + i * words);
  return out;
}

// y[i, row] = sum over the recruited units k of s(W[row, k]).
const int32_t* recruited_products(const State& state, const uint64_t* weight, int64_t rows, int64_t units,
                                  const Call& call) {
  auto* y = call.memory.get<int32_t>(state.samples * rows);
  BinaryMatmul p{};
  p.x = own_gates(state, words_for(units), call), p.w = weight;
  p.gate = state.gate, p.gate_stride = state.gate_stride, p.y = y;
  p.M = state.samples, p.N = rows, p.K = units, p.words = words_for(units);
  cpu::binary_matmul(call.kernels, p);
  return y;
}

void give_scores(State& state, const float* scores, int64_t classes) {
  state = {state.samples, {scores, Type::kFloat32, classes, 0}, nullptr, nullptr, 0};
}

}  // namespace

double mean_of(const float* y, int64_t units) {
  double sum = 0;
  for (int64_t n = 0; n < units; ++n) sum += y[n];
  return sum / static_cast<double>(units);
}

const float* as_floats(const State& state, const Call& call) {
  if (state.y.type == Type::kFloat32) return static_cast<const float*>(state.y.data);
  const int64_t count = state.samples * state.y.units;
  float* out = call.memory.get<float>(count);
  if (state.y.type == Type::kInt32)
    std::copy_n(static_cast<const int32_t*>(state.y.data), count, out);
  else
    std::copy_n(static_cast<const uint8_t*>(state.y.data), count, out);
  return out;
}

// ---- products

int64_t Product::steps() const { return inputs * outputs / (real ? 64 : 512); }

void Product::run(State& state, const Call& call) const {
  const bool exact = !real || state.y.type != Type::kFloat32;
  if (real && exact && groups != nullptr) {
    const int64_t stride = ceil_div(outputs, kGroupedRows) * kGroupedRows;
    const GroupedProduct p{static_cast<const uint8_t*>(state.y.data),
                           groups,
                           stride,
                           static_cast<int32_t*>(call.values),
                           state.samples,
                           outputs,
                           inputs};
    cpu::grouped_product(call.kernels, p, weight);
  } else if (real) {
    SignProduct p{};
    p.a = state.y.data, p.element = exact ? Element::kUint8 : Element::kFloat32;
    p.signs = weight, p.y = call.values;
    p.R = state.samples, p.I = inputs, p.V = outputs;
    cpu::sign_product(call.kernels, p);
  } else {
    BinaryMatmul p{};
    p.x = state.bits, p.w = weight, p.gate = state.gate, p.gate_stride = state.gate_stride;
    p.y = static_cast<int32_t*>(call.values);
    p.M = state.samples, p.N = outputs, p.K = inputs, p.words = words_for(inputs);
    cpu::binary_matmul(call.kernels, p);
  }
  const int64_t largest = real ? 255 * inputs : inputs;
  state = {state.samples, {call.values, exact ? Type::kInt32 : Type::kFloat32, outputs, largest}, nullptr, nullptr, 0};
}

// ---- images

int64_t Convolution::steps() const { return out_pixels(window) * group_units(window) * outputs / (real ? 64 : 512); }

void Convolution::run(State& state, const Call& call) const {
  const bool exact = !real || state.y.type != Type::kFloat32;
  if (real) {
    run_real(state, exact, call);
  } else {
    BinaryConv2d p{};
    p.x = state.bits, p.w = weight, p.gate = state.gate, p.gate_stride = state.gate_stride;
    p.window = window, p.samples = state.samples, p.outputs = outputs;
    p.sums = static_cast<int32_t*>(call.values);
    cpu::binary_conv2d(call.kernels, p);
  }
  const int64_t largest = group_units(window) * (real ? 255 : 1);
  state = {state.samples, {call.values, exact ? Type::kInt32 : Type::kFloat32, units(), largest}, nullptr, nullptr, 0};
}

namespace {

// The taps of each output pixel of an image as a row; padding is 0.
template <typename T>
void unfold(const T* image, const Window& w, T* rows) {
  const int64_t channels = w.channels, out_h = out_height(w), out_w = out_width(w);
  std::fill_n(rows, out_h * out_w * group_units(w), T{0});
  for (int64_t y = 0; y < out_h; ++y)
    for (int64_t x = 0; x < out_w; ++x, rows += group_units(w)) {
      const Taps lines = taps_of_row(w, y), columns = taps_of_column(w, x);
      const int64_t some = w.dilation_w == 1 ? columns.last - columns.first : 1;  // taps side by side in the image
      if (some <= 0) continue;
      for (int64_t i = lines.first; i < lines.last; ++i)
        for (int64_t j = columns.first; j < columns.last; j += some) {
          const int64_t pixel = (lines.start + i * w.dilation_h) * w.width + columns.start + j * w.dilation_w;
          std::copy_n(image + pixel * channels, some * channels, rows + (i * w.kernel_w + j) * channels);
        }
    }
}

}  // namespace

void Convolution::run_real(const State& state, bool exact, const Call& call) const {
  const int64_t pixels = out_pixels(window), inputs = group_units(window);
  void* rows = call.memory.allocate(static_cast<size_t>(pixels * inputs) * (exact ? 1 : sizeof(float)));
  for (int64_t i = 0; i < state.samples; ++i) {
    int32_t* y = static_cast<int32_t*>(call.values) + i * units();
    if (exact) {
      auto* bytes = static_cast<uint8_t*>(rows);
      unfold(static_cast<const uint8_t*>(state.y.data) + i * state.y.units, window, bytes);
      const int64_t stride = ceil_div(outputs, kGroupedRows) * kGroupedRows;
      cpu::grouped_product(call.kernels, {bytes, groups, stride, y, pixels, outputs, inputs}, weight);
      continue;
    }
    unfold(static_cast<const float*>(state.y.data) + i * state.y.units, window, static_cast<float*>(rows));
    SignProduct p{};
    p.a = rows, p.element = Element::kFloat32, p.signs = weight, p.y = y;
    p.R = pixels, p.I = inputs, p.V = outputs;
    cpu::sign_product(call.kernels, p);
  }
}

void MaxPool::run(State& state, const Call& call) const {
  auto* bits = call.memory.get<uint64_t>(state.samples * words_for(units()));
  cpu::pool_bits(call.kernels, {state.bits, window, flip_bits, bits}, state.samples);
  state = {state.samples, {nullptr, Type::kInt32, units(), 0}, bits, nullptr, 0};
}

namespace {

template <typename T>
T* transposed(const T* y, int64_t samples, int64_t rows, int64_t columns, const Call& call) {
  T* out = call.memory.get<T>(samples * rows * columns);
  for (int64_t i = 0; i < samples; ++i, y += rows * columns)
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t r = 0; r < rows; ++r) out[(i * columns + c) * rows + r] = y[r * columns + c];
  return out;
}

}  // namespace

void Transpose::run(State& state, const Call& call) const {
  if (state.y.type == Type::kUint8)
    state.y.data = transposed(static_cast<const uint8_t*>(state.y.data), state.samples, rows, columns, call);
  else  // of 4 bytes
    state.y.data = transposed(static_cast<const int32_t*>(state.y.data), state.samples, rows, columns, call);
  state.bits = state.gate = nullptr;
}

// ---- signs and gates

int64_t threshold_period(int64_t channels, int64_t units) {
  const int64_t period = std::lcm(channels, kRowBits);
  return units % period == 0 ? period : units;
}

void Sign::run(State& state, const Call& call) const {
  auto* bits = call.memory.get<uint64_t>(state.samples * words_for(units));
  state.bits = bits;
  const bool rounded = real != nullptr && state.y.largest > kMostExact;  // float32 may reach what integers do not
  const int64_t rows = state.samples * (units / period);
  if (state.y.type == Type::kFloat32 || rounded) return pack_floats(as_floats(state, call), rows, bits);
  const int32_t* y = as_integers(state, call);
  cpu::prepared_signs(call.kernels,
                      {{y, by_mean ? nullptr : threshold, nullptr, rows, period, bits}, by_mean ? nullptr : flip_bits});
}

void Sign::pack_floats(const float* y, int64_t rows, uint64_t* bits) const {
  const int64_t words = words_for(period);
  std::fill_n(bits, rows * words, 0);
  for (int64_t i = 0; i < rows; ++i, y += period, bits += words) {
    const double mean = by_mean ? mean_of(y, period) : 0;
    for (int64_t n = 0; n < period; ++n) {
      require(!std::isnan(y[n]), "x: expected numbers whose products are numbers, got NaN");
      const bool reached = by_mean ? static_cast<double>(y[n]) >= mean
                                   : y[n] >= (real == nullptr ? static_cast<float>(threshold[n]) : real[n]);
      bits[n / kWordBits] |= uint64_t{reached} << n % kWordBits;
    }
    for (int64_t word = 0; !by_mean && flip_bits != nullptr && word < words; ++word) bits[word] ^= flip_bits[word];
  }
}

void Recruit::run(State& state, const Call& call) const {
  auto* gate = call.memory.get<uint64_t>(state.samples * words_for(units));
  state.gate_stride = words_for(units);
  state.gate = gate;
  if (state.y.type != Type::kFloat32) {
    const int32_t* keys = integer_keys(as_integers(state, call), state.samples, call);
    return cpu::top_units(call.kernels, {keys, state.samples, units, count, gate});
  }
  SampleEngram p{};
  p.score = scores(state, call), p.gate = gate;
  p.M = state.samples, p.K = units, p.words = words_for(units);
  p.count = count, p.inverse_temperature = -1.0f, p.row_step = 1;
  require(!cpu::sample_engram(call.kernels, p), "x: expected numbers whose products are numbers, got NaN");
}

// Numbers in the order of the scores, equal where those are.
const float* Recruit::scores(const State& state, const Call& call) const {
  const auto* y = static_cast<const float*>(state.y.data);
  if (score == Score::kValue) return y;
  float* out = call.memory.get<float>(state.samples * units);
  for (int64_t i = 0; i < state.samples; ++i, y += units) {
    float* row = out + i * units;
    std::copy_n(y, units, row);
    if (score != Score::kMagnitude) standardise(row, units);
    for (int64_t n = 0; n < units && !has_sign(); ++n) row[n] = std::fabs(row[n]);
  }
  return out;
}

// The same of integers. |N y - sum| may need 64 bits; its rank among all that are possible needs one more than y.
// With sum = q N + r and v = y - q it is N v - r where v > 0, and r - N v elsewhere.
const int32_t* Recruit::integer_keys(const int32_t* y, int64_t samples, const Call& call) const {
  if (has_sign()) return y;
  auto* out = call.memory.get<int32_t>(samples * units);
  for (int64_t i = 0; i < samples; ++i, y += units) {
    int64_t q = 0, r = 0;
    if (score == Score::kDistance) {
      int64_t sum = 0;
      for (int64_t n = 0; n < units; ++n) sum += y[n];
      q = floor_div(sum, units), r = sum - q * units;
    }
    const bool level = r == 0 || 2 * r == units;  // each distance above 0 occurs on both sides
    const int32_t scale = level ? 1 : 2;
    const int32_t above = r == 0 ? 0 : 2 * r < units || level ? 1 : 2, below = 2 * r > units ? 1 : 0;
    for (int64_t n = 0; n < units; ++n) {
      const auto v = static_cast<int32_t>(y[n] - q);
      out[i * units + n] = v > 0 ? scale * v - above : below - scale * v;
    }
  }
  return out;
}

void Affine::run(State& state, const Call& call) const {
  const bool whole = state.y.type == Type::kInt32;
  auto* out = static_cast<float*>(call.values);
  cpu::scale_values(call.kernels, {whole ? static_cast<const int32_t*>(state.y.data) : nullptr,
                                   whole ? nullptr : as_floats(state, call), factors, factor_count, scale, shift,
                                   state.samples, units, out});
  state.y = {out, Type::kFloat32, units, 0};
}

// ---- read-outs

int64_t Dendritic::steps() const { return inputs * classes * segments / 512; }

void Dendritic::run(State& state, const Call& call) const {
  const int64_t rows = classes * segments;
  const int32_t* y = recruited_products(state, weight, rows, inputs, call);
  const auto root = static_cast<float>(std::sqrt(static_cast<double>(recruited)));
  float* own = call.memory.get<float>(segments);
  float* scores = call.memory.get<float>(state.samples * classes);
  for (int64_t i = 0; i < state.samples; ++i) {
    for (int64_t c = 0; c < classes; ++c) {
      for (int64_t j = 0; j < segments; ++j) {
        const int64_t row = c * segments + j;
        own[j] = (static_cast<float>(y[i * rows + row]) - mean_product[row]) / root;
      }
      if (top_segments > 1) std::nth_element(own, own + (top_segments - 1), own + segments, std::greater<float>());
      float sum = 0;
      for (int64_t j = 0; j < top_segments; ++j) sum += own[j];
      scores[i * classes + c] =
          top_segments == 1 ? *std::max_element(own, own + segments) : sum / static_cast<float>(top_segments);
    }
  }
  give_scores(state, scores, classes);
}

int64_t Prototype::steps() const { return inputs * classes / 512; }

void Prototype::run(State& state, const Call& call) const {
  const int32_t* y = recruited_products(state, bits, classes, inputs, call);
  const auto root = static_cast<float>(std::sqrt(static_cast<double>(recruited)));
  float* scores = call.memory.get<float>(state.samples * classes);
  for (int64_t i = 0; i < state.samples; ++i)
    for (int64_t c = 0; c < classes; ++c) {
      const float score = (static_cast<float>(y[i * classes + c]) - offset[c]) / root;
      scores[i * classes + c] = samples[c] == 0 ? kNoClass : score;
    }
  give_scores(state, scores, classes);
}

void Ridge::run(State& state, const Call& call) const {
  const int64_t M = state.samples;
  float* y = call.memory.get<float>(classes * M);  // a gate is half the sum of its sign and 1
  float* scores = call.memory.get<float>(M * classes);
  SignProduct p{};
  p.a = weight, p.signs = own_gates(state, words_for(inputs), call), p.y = y;
  p.R = classes, p.I = inputs, p.V = M;
  cpu::sign_product(call.kernels, p);
  for (int64_t i = 0; i < M; ++i)
    for (int64_t c = 0; c < classes; ++c) {
      const float score = 0.5f * (y[c * M + i] + weight_sums[c]) + bias[c];
      scores[i * classes + c] = samples[c] == 0 ? kNoClass : score;
    }
  give_scores(state, scores, classes);
}

// ---- threads

namespace {

constexpr int64_t kSamples = 64;               // whose activations are held at a time, in the second-level cache
constexpr int64_t kValues = int64_t{1} << 19;  // of them, but for kFewestSamples: a thread keeps their memory
constexpr int64_t kFewestSamples = 8;
constexpr int64_t kLeastSamples = 16;              // of a share: a few tiles of the products
constexpr int64_t kLeastSteps = int64_t{1} << 15;  // of a share: a thread that sleeps is woken in about as much time

thread_local Workspace workspace;

void run_serially(int64_t count, int64_t, cpu::Runtime::Body body, void* context) { body(0, count, context); }

void* allocate(void* owner, size_t bytes) { return static_cast<Workspace*>(owner)->allocate(bytes); }

struct Shared {
  const std::function<void(int64_t, int64_t, const Call&)>& run;
  int64_t units;
  std::mutex mutex;
  std::exception_ptr failure;  // the first

  void work(int64_t begin, int64_t end, const cpu::Runtime& runtime) {
    const int64_t at_once = std::min(kSamples, std::max(kFewestSamples, kValues / units));
    const int64_t parts = ceil_div(end - begin, at_once);
    for (int64_t part = 0, first = begin; part < parts; ++part) {
      const int64_t last = begin + (end - begin) * (part + 1) / parts, count = last - first;
      workspace.clear();
      Call call{runtime, workspace, nullptr};
      call.kernels.allocate = allocate, call.kernels.owner = &workspace;
      call.values = workspace.get<int32_t>(count * units);
      run(first, count, call);
      first = last;
    }
  }
  void work_alone(int64_t begin, int64_t end) noexcept {  // no exception passes a thread
    try {
      const cpu::DefaultFloatMode mode;
      work(begin, end, {run_serially, nullptr, nullptr, 1});
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      if (failure == nullptr) failure = std::current_exception();
    }
  }
};

}  // namespace

void share_samples(const cpu::Runtime& runtime, int64_t samples, int64_t steps, int64_t units,
                   const std::function<void(int64_t begin, int64_t count, const Call&)>& run) {
  Shared shared{run, units, {}, nullptr};
  if (runtime.threads > 1 && samples < kLeastSamples * runtime.threads && samples * steps >= 2 * kLeastSteps) {
    const cpu::DefaultFloatMode mode;
    return shared.work(0, samples, runtime);
  }
  const int64_t grain = std::max(kLeastSamples, ceil_div(kLeastSteps, std::max<int64_t>(1, steps)));
  if (runtime.threads == 1 || samples <= grain)
    shared.work_alone(0, samples);
  else
    runtime.parallel_for(
        samples, grain,
        [](int64_t begin, int64_t end, void* context) { static_cast<Shared*>(context)->work_alone(begin, end); },
        &shared);
  if (shared.failure != nullptr) std::rethrow_exception(shared.failure);
}

}  // namespace engram::runtime
