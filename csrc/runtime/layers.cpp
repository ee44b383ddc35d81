#include "runtime/layers.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <iterator>

#include "core/bits.h"
#include "runtime/error.h"

namespace engram::runtime {
namespace {

constexpr int64_t kMostExact = int64_t{1} << 24;      // integers up to here are exact in float32
constexpr int64_t kMostInputs = INT32_MAX / 255 / 4;  // of bytes: twice their distance from a mean is an int32

// Of `Flow`: units of the values, and signs and gate where a layer needs them.
void require_units(const Flow& before, int64_t units, const std::string& name) {
  require(!before.scores, name, ": expected nothing behind a read-out");
  require(before.units == units, name, ": expected ", before.units, " units, as come from before it, got ", units);
}

float* floats(const Call& call, const State& state, int64_t units) {
  return call.memory.get<float>(state.samples * units);
}

// Values as float32, which holds all that occur exactly: sums of up to 2^24 signs, and bytes.
const float* as_floats(const State& state, const Call& call) {
  if (state.y.type == Type::kFloat32) return static_cast<const float*>(state.y.data);
  const int64_t count = state.samples * state.y.units;
  float* out = floats(call, state, state.y.units);
  if (state.y.type == Type::kInt32)
    std::copy_n(static_cast<const int32_t*>(state.y.data), count, out);
  else
    std::copy_n(static_cast<const uint8_t*>(state.y.data), count, out);
  return out;
}

const int32_t* as_integers(const State& state, const Call& call) {
  if (state.y.type == Type::kInt32) return static_cast<const int32_t*>(state.y.data);
  int32_t* out = call.memory.get<int32_t>(state.samples * state.y.units);
  std::copy_n(static_cast<const uint8_t*>(state.y.data), state.samples * state.y.units, out);
  return out;
}

int64_t sum_of(const int32_t* y, int64_t units) {
  int64_t sum = 0;
  for (int64_t n = 0; n < units; ++n) sum += y[n];
  return sum;
}

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0 ? 1 : 0); }

// The mean of float32 values, summed in their order.
double mean_of(const float* y, int64_t units) {
  double sum = 0;
  for (int64_t n = 0; n < units; ++n) sum += y[n];
  return sum / static_cast<double>(units);
}

class Encode : public Layer {
 public:
  Encode(const Json& fields, const std::string& name, File& file)
      : name_(name), features_(size_field(fields, "features", name)), inputs_(size_field(fields, "inputs", name)) {
    require(inputs_ % features_ == 0, name, ": expected inputs that are a multiple of features");
    mean_ = file.tensor<float>(name + ".mean", "F32", {features_});
    scale_ = file.tensor<float>(name + ".scale", "F32", {features_});
    const int64_t each = inputs_ / features_;
    for (int64_t j = 0; j < each; ++j) {  // as float32, step by step, as InputEncoding computes them
      const float u = (static_cast<float>(j) + 0.5f) / static_cast<float>(each);
      const float angle = static_cast<float>(3.14159265358979323846) * (u - 0.5f);
      thresholds_.push_back(0.3f * static_cast<float>(std::tan(static_cast<double>(angle))));
    }
  }

  Flow flow(const Flow& before) const override {
    require_units(before, features_, name_);
    require(before.input && !before.bits && !before.gate, name_, ": expected to be the first layer");
    Flow after = before;
    after.units = inputs_;
    return after;
  }

  void run(State& state, const Call& call) const override {
    const bool one_each = inputs_ == features_;
    if (state.y.type == Type::kUint8 && one_each) return;
    const float* x = as_floats(state, call);
    float* out = floats(call, state, inputs_);
    const int64_t each = inputs_ / features_;
    for (int64_t i = 0; i < state.samples; ++i) {
      for (int64_t f = 0; f < features_; ++f) {
        const float z = (x[i * features_ + f] - mean_[f]) / scale_[f];
        float* inputs = out + i * inputs_ + f * each;
        if (one_each) {
          inputs[0] = std::min(3.0f, std::max(-3.0f, z));
          continue;
        }
        for (int64_t j = 0; j < each; ++j)
          inputs[j] = std::min(1.0f, std::max(-1.0f, 2.0f * (z - thresholds_[static_cast<size_t>(j)])));
      }
    }
    state.y = {out, Type::kFloat32, inputs_, 0};
  }

 private:
  std::string name_;
  int64_t features_, inputs_;
  const float *mean_, *scale_;
  std::vector<float> thresholds_;
};

// Each sample by its own mean and deviation, after a division by its largest magnitude.
class Standardise : public Layer {
 public:
  Standardise(const Json& fields, const std::string& name)
      : name_(name), features_(size_field(fields, "features", name)) {}

  Flow flow(const Flow& before) const override {
    require_units(before, features_, name_);
    require(before.input && !before.bits && !before.gate, name_, ": expected to be the first layer");
    return before;
  }

  void run(State& state, const Call& call) const override {
    const float* x = as_floats(state, call);
    float* out = floats(call, state, features_);
    for (int64_t i = 0; i < state.samples; ++i) standardise(x + i * features_, out + i * features_);
    state.y = {out, Type::kFloat32, features_, 0};
  }

 private:
  void standardise(const float* x, float* out) const {
    float peak = 0;
    for (int64_t f = 0; f < features_; ++f) peak = std::max(peak, std::fabs(x[f]));
    for (int64_t f = 0; f < features_; ++f) out[f] = x[f] / (peak > 0 ? peak : 1.0f);
    const auto mean = static_cast<float>(mean_of(out, features_));
    double squares = 0;
    for (int64_t f = 0; f < features_; ++f) {
      out[f] -= mean;
      squares += static_cast<double>(out[f]) * static_cast<double>(out[f]);
    }
    const float deviation = std::sqrt(static_cast<float>(squares / static_cast<double>(features_)));
    for (int64_t f = 0; f < features_; ++f) out[f] = deviation > 1e-5f ? out[f] / deviation : 0.0f;
  }

  std::string name_;
  int64_t features_;
};

class Product : public Layer {
 public:
  Product(const Json& fields, const std::string& name, File& file)
      : name_(name),
        inputs_(size_field(fields, "inputs", name)),
        outputs_(size_field(fields, "outputs", name)),
        real_(fields.at("real", name).flag(name)) {
    require(!real_ || inputs_ <= kMostInputs, name, ": expected at most ", kMostInputs, " inputs, got ", inputs_);
    weight_ = packed_weight(file, name, outputs_, inputs_);
  }

  static const uint64_t* packed_weight(File& file, const std::string& name, int64_t rows, int64_t units) {
    return reinterpret_cast<const uint64_t*>(file.tensor<int64_t>(name + ".weight", "I64", {rows, words_for(units)}));
  }

  Flow flow(const Flow& before) const override {
    require_units(before, inputs_, name_);
    require(real_ ? before.input : before.bits, name_, ": expected ",
            real_ ? "real inputs at the first product" : "a sign layer before it");
    return {outputs_, false, false, false, false};
  }

  void run(State& state, const Call& call) const override {
    void* y = call.memory.get<int32_t>(state.samples * outputs_);
    Type type = Type::kInt32;
    if (real_) {
      const bool exact = state.y.type != Type::kFloat32;
      SignProduct p{};
      p.a = state.y.data, p.element = exact ? Element::kUint8 : Element::kFloat32;
      p.signs = weight_, p.y = y;
      p.R = state.samples, p.I = inputs_, p.V = outputs_;
      cpu::sign_product(call.kernels, p);
      type = exact ? Type::kInt32 : Type::kFloat32;
    } else {
      BinaryMatmul p{};
      p.x = state.bits, p.w = weight_, p.gate = state.gate, p.gate_stride = state.gate_stride;
      p.y = static_cast<int32_t*>(y);
      p.M = state.samples, p.N = outputs_, p.K = inputs_, p.words = words_for(inputs_);
      cpu::binary_matmul(call.kernels, p);
    }
    state = {state.samples, {y, type, outputs_, real_ ? 255 * inputs_ : inputs_}, nullptr, nullptr, 0};
  }

 private:
  std::string name_;
  int64_t inputs_, outputs_;
  bool real_;
  const uint64_t* weight_;
};

class Sign : public Layer {
 public:
  Sign(const Json& fields, const std::string& name, File& file)
      : name_(name), units_(size_field(fields, "units", name)) {
    const std::string& by = fields.at("by", name).string(name);
    require(by == "threshold" || by == "mean", name, ": expected by threshold or by mean, got ", by);
    by_mean_ = by == "mean";
    if (by_mean_) {
      flip_.assign(static_cast<size_t>(units_), 0);
      return;
    }
    const auto* flip = file.tensor<uint8_t>(name + ".flip", "U8", {units_});
    for (int64_t n = 0; n < units_; ++n) require(flip[n] <= 1, name, ".flip: expected 0 or 1, got ", int{flip[n]});
    flip_.assign(flip, flip + units_);
    if (file.has_dtype(name + ".threshold", "I32")) {
      const auto* threshold = file.tensor<int32_t>(name + ".threshold", "I32", {units_});
      whole_.assign(threshold, threshold + units_);
      return;
    }
    const auto* threshold = file.tensor<float>(name + ".threshold", "F32", {units_});
    for (int64_t n = 0; n < units_; ++n) {
      require(!std::isnan(threshold[n]), name, ".threshold: expected numbers, got NaN");
      const double least = std::ceil(static_cast<double>(threshold[n]));
      whole_.push_back(static_cast<int32_t>(std::min<double>(INT32_MAX, std::max<double>(INT32_MIN, least))));
    }
    real_.assign(threshold, threshold + units_);
  }

  Flow flow(const Flow& before) const override {
    require_units(before, units_, name_);
    Flow after = before;
    after.bits = true;
    return after;
  }

  void run(State& state, const Call& call) const override {
    const int64_t words = words_for(units_);
    auto* bits = call.memory.get<uint64_t>(state.samples * words);
    state.bits = bits;
    const bool rounded = !real_.empty() && state.y.largest > kMostExact;  // float32 may reach what integers do not
    if (state.y.type == Type::kFloat32 || rounded) {
      pack_floats(as_floats(state, call), state.samples, bits);
      return;
    }
    const int32_t* y = as_integers(state, call);
    const bool means = by_mean_;
    cpu::value_signs(call.kernels,
                     {y, means ? nullptr : whole_.data(), means ? nullptr : flip_.data(), state.samples, units_, bits});
  }

 private:
  void pack_floats(const float* y, int64_t samples, uint64_t* bits) const {
    const int64_t words = words_for(units_);
    std::fill_n(bits, samples * words, 0);
    for (int64_t i = 0; i < samples; ++i, y += units_, bits += words) {
      const double mean = by_mean_ ? mean_of(y, units_) : 0;
      for (int64_t n = 0; n < units_; ++n) {
        require(!std::isnan(y[n]), "x: expected numbers whose products are numbers, got NaN");
        const bool reached = by_mean_ ? static_cast<double>(y[n]) >= mean
                                      : (y[n] >= threshold(n)) != (flip_[static_cast<size_t>(n)] != 0);
        bits[n / kWordBits] |= uint64_t{reached} << n % kWordBits;
      }
    }
  }

  float threshold(int64_t n) const {
    const auto i = static_cast<size_t>(n);
    return real_.empty() ? static_cast<float>(whole_[i]) : real_[i];
  }

  std::string name_;
  int64_t units_;
  bool by_mean_;
  std::vector<int32_t> whole_;  // thresholds of integers
  std::vector<float> real_;     // and of float32, where the file has those
  std::vector<uint8_t> flip_;
};

class Recruit : public Layer {
 public:
  Recruit(const Json& fields, const std::string& name)
      : name_(name), units_(size_field(fields, "units", name)), count_(size_field(fields, "recruited", name)) {
    require(count_ <= units_, name, ": expected at most ", units_, " recruited units, got ", count_);
    const std::string& score = fields.at("score", name).string(name);
    const char* const names[] = {"value", "magnitude", "standardised", "distance"};
    const auto found = std::find(std::begin(names), std::end(names), score);
    require(found != std::end(names), name, ": expected score value, magnitude, standardised or distance, got ", score);
    score_ = static_cast<Score>(found - names);
  }

  Flow flow(const Flow& before) const override {
    require_units(before, units_, name_);
    Flow after = before;
    after.gate = true;
    return after;
  }

  void run(State& state, const Call& call) const override {
    auto* gate = call.memory.get<uint64_t>(state.samples * words_for(units_));
    state.gate_stride = words_for(units_);
    state.gate = gate;
    if (state.y.type != Type::kFloat32) {
      const int32_t* keys = integer_keys(as_integers(state, call), state.samples, call);
      return cpu::top_units(call.kernels, {keys, state.samples, units_, count_, gate});
    }
    SampleEngram p{};
    p.score = scores(state, call), p.gate = gate;
    p.M = state.samples, p.K = units_, p.words = words_for(units_);
    p.count = count_, p.inverse_temperature = -1.0f, p.row_step = 1;
    require(!cpu::sample_engram(call.kernels, p), "x: expected numbers whose products are numbers, got NaN");
  }

 private:
  enum class Score { kValue, kMagnitude, kStandardised, kDistance };
  // Numbers in the order of the scores, equal where those are.
  const float* scores(const State& state, const Call& call) const {
    const auto* y = static_cast<const float*>(state.y.data);
    if (score_ == Score::kValue) return y;
    float* out = floats(call, state, units_);
    for (int64_t i = 0; i < state.samples; ++i, y += units_) {
      float* row = out + i * units_;
      std::copy_n(y, units_, row);
      if (score_ != Score::kMagnitude) standardise(row, units_);
      for (int64_t n = 0; n < units_ && !has_sign(); ++n) row[n] = std::fabs(row[n]);
    }
    return out;
  }

  // The same of integers. |N y - sum| may need 64 bits; its rank among all that are possible needs one more than y.
  // With sum = q N + r and v = y - q it is N v - r where v > 0, and r - N v elsewhere.
  const int32_t* integer_keys(const int32_t* y, int64_t samples, const Call& call) const {
    if (has_sign()) return y;
    auto* out = call.memory.get<int32_t>(samples * units_);
    for (int64_t i = 0; i < samples; ++i, y += units_) {
      int64_t q = 0, r = 0;
      if (score_ == Score::kDistance) {
        const int64_t sum = sum_of(y, units_);
        q = floor_div(sum, units_), r = sum - q * units_;
      }
      const bool level = r == 0 || 2 * r == units_;  // each distance above 0 occurs on both sides
      const int32_t scale = level ? 1 : 2;
      const int32_t above = r == 0 ? 0 : 2 * r < units_ || level ? 1 : 2, below = 2 * r > units_ ? 1 : 0;
      for (int64_t n = 0; n < units_; ++n) {
        const auto v = static_cast<int32_t>(y[n] - q);
        out[i * units_ + n] = v > 0 ? scale * v - above : below - scale * v;
      }
    }
    return out;
  }

  bool has_sign() const { return score_ == Score::kValue || score_ == Score::kStandardised; }

  // As engram_kernels.ExactLayerNorm rounds, which makes close values equal ones.
  static void standardise(float* y, int64_t units) {
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

  std::string name_;
  int64_t units_, count_;
  Score score_;
};

class Gate : public Layer {
 public:
  Gate(const Json& fields, const std::string& name, File& file)
      : name_(name),
        units_(size_field(fields, "units", name)),
        gate_(reinterpret_cast<const uint64_t*>(file.tensor<int64_t>(name + ".gate", "I64", {words_for(units_)}))) {}

  Flow flow(const Flow& before) const override {
    require_units(before, units_, name_);
    Flow after = before;
    after.gate = true;
    return after;
  }

  void run(State& state, const Call&) const override { state.gate = gate_, state.gate_stride = 0; }

 private:
  std::string name_;
  int64_t units_;
  const uint64_t* gate_;
};

class Affine : public Layer {
 public:
  Affine(const Json& fields, const std::string& name, File& file)
      : name_(name), units_(size_field(fields, "units", name)) {
    for (const Json& factor : fields.at("factors", name).list(name))
      factors_.push_back(static_cast<float>(factor.number(name)));
    if (file.has(name + ".scale")) scale_ = file.tensor<float>(name + ".scale", "F32", {units_});
    if (file.has(name + ".shift")) shift_ = file.tensor<float>(name + ".shift", "F32", {units_});
    require(scale_ == nullptr || shift_ != nullptr, name, ".shift: expected a tensor beside a scale, got none");
  }

  Flow flow(const Flow& before) const override {
    require_units(before, units_, name_);
    return before;
  }

  void run(State& state, const Call& call) const override {
    const float* y = as_floats(state, call);
    float* out = floats(call, state, units_);
    for (int64_t i = 0; i < state.samples; ++i) {
      for (int64_t n = 0; n < units_; ++n) {
        float value = y[i * units_ + n];
        for (const float factor : factors_) value *= factor;
        if (scale_ != nullptr)
          value = std::fma(value, scale_[n], shift_[n]);
        else if (shift_ != nullptr)
          value += shift_[n];
        out[i * units_ + n] = value;
      }
    }
    state.y = {out, Type::kFloat32, units_, 0};
  }

 private:
  std::string name_;
  int64_t units_;
  std::vector<float> factors_;
  const float *scale_ = nullptr, *shift_ = nullptr;
};

}  // namespace

int64_t size_field(const Json& description, const char* key, const std::string& name) {
  const int64_t value = description.at(key, name).integer(name + "." + key);
  require(value >= 1 && value <= INT32_MAX, name, ".", key, ": expected 1 to 2^31 - 1, got ", value);
  return value;
}

std::unique_ptr<Layer> make_layer(const Json& description, const std::string& name, File& file) {
  const std::string& kind = description.at("kind", name).string(name + ".kind");
  if (kind == "encode") return std::make_unique<Encode>(description, name, file);
  if (kind == "standardise") return std::make_unique<Standardise>(description, name);
  if (kind == "product") return std::make_unique<Product>(description, name, file);
  if (kind == "sign") return std::make_unique<Sign>(description, name, file);
  if (kind == "recruit") return std::make_unique<Recruit>(description, name);
  if (kind == "gate") return std::make_unique<Gate>(description, name, file);
  if (kind == "affine") return std::make_unique<Affine>(description, name, file);
  std::unique_ptr<Layer> readout = make_readout(description, name, file);
  require(readout != nullptr, name, ": expected a kind of layer of this version, got ", kind);
  return readout;
}

}  // namespace engram::runtime
