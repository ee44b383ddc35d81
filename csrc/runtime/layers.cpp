#include "runtime/layers.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <iterator>
#include <type_traits>
#include <vector>

#include "core/bits.h"
#include "core/window_check.h"
#include "runtime/error.h"

namespace engram::runtime {
namespace {

constexpr int64_t kMostInputs = INT32_MAX / 255 / 4;  // of bytes: twice their distance from a mean is an int32

// Of `Flow`: units of the values, and signs and gate where a layer needs them.
void require_units(const Flow& before, int64_t units, const std::string& name) {
  require(!before.scores, name, ": expected nothing behind a read-out");
  require(before.units == units, name, ": expected ", before.units, " units, as come from before it, got ", units);
}

void require_values(const Flow& before, const std::string& name) {
  require(before.values, name, ": expected a layer before it that makes values, got signs alone");
}

// The window of a layer on images, field by field.
Window window_of(const Json& fields, const std::string& name) {
  const Json& numbers = fields.at("window", name);
  Window w{};
  for (const WindowField& field : kWindowFields)
    w.*field.number = numbers.at(field.name, name + ".window").integer(name + ".window." + field.name);
  const std::string fault = window_fault(w);
  require(fault.empty(), name, ".window: ", fault);
  return w;
}

// The units of images of so many channels. Raises: Error for more than others can count.
int64_t image_units(int64_t pixels, int64_t channels, const std::string& name) {
  require(channels <= INT32_MAX / pixels, name, ": expected at most 2^31 - 1 units, got ", pixels, " x ", channels);
  return pixels * channels;
}

const uint64_t* signs_of(File& file, const std::string& name, int64_t rows, int64_t units) {
  return reinterpret_cast<const uint64_t*>(file.tensor<int64_t>(name, "I64", {rows, words_for(units)}));
}

// Flips of channels that come again in each pixel of so many units, packed.
std::vector<uint64_t> flips_of(File& file, const std::string& name, int64_t channels, int64_t units) {
  const auto* flip = file.tensor<uint8_t>(name, "U8", {channels});
  for (int64_t n = 0; n < channels; ++n) require(flip[n] <= 1, name, ": expected 0 or 1, got ", int{flip[n]});
  std::vector<uint64_t> bits(static_cast<size_t>(words_for(units)), 0);
  for (int64_t n = 0; n < units; ++n)
    bits[static_cast<size_t>(n / kWordBits)] |= uint64_t{flip[n % channels]} << n % kWordBits;
  return bits;
}

float* floats(const Call& call, const State& state, int64_t units) {
  return call.memory.get<float>(state.samples * units);
}

// A layer that is a stage.
template <typename S>
class StageLayer : public Layer {
 public:
  StageLayer(const Json& fields, const std::string& name)
      : name_(name), units_(size_field(fields, "units", name)), stage_{} {
    stage_.units = units_;
  }

  Flow flow(const Flow& before) const override {
    require_units(before, units_, name_);
    if (!std::is_same_v<S, Gate>) require_values(before, name_);
    Flow after = before;
    after.bits |= std::is_same_v<S, Sign>;
    after.gate |= std::is_same_v<S, Recruit> || std::is_same_v<S, Gate>;
    return after;
  }
  int64_t steps() const override { return stage_.steps(); }
  void run(State& state, const Call& call) const override { stage_.run(state, call); }

 protected:
  std::string name_;
  int64_t units_;
  S stage_;
};

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

  int64_t steps() const override { return inputs_; }
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

  int64_t steps() const override { return features_; }
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

// Signs as GroupedProduct takes them.
std::vector<uint16_t> grouped(const uint64_t* weight, int64_t outputs, int64_t inputs) {
  const int64_t stride = ceil_div(outputs, kGroupedRows) * kGroupedRows;
  std::vector<uint16_t> groups(static_cast<size_t>(ceil_div(inputs, kGroup) * stride), 0);
  for (int64_t n = 0; n < outputs; ++n)
    for (int64_t k = 0; k < inputs; ++k) {
      const uint64_t bit = weight[n * words_for(inputs) + k / kWordBits] >> k % kWordBits & 1;
      groups[static_cast<size_t>(k / kGroup * stride + n)] |= static_cast<uint16_t>(bit << place_in_group(k % kGroup));
    }
  return groups;
}

class ProductLayer : public Layer {
 public:
  ProductLayer(const Json& fields, const std::string& name, File& file) : name_(name), stage_{} {
    stage_.inputs = size_field(fields, "inputs", name);
    stage_.outputs = size_field(fields, "outputs", name);
    stage_.real = fields.at("real", name).flag(name);
    require(!stage_.real || stage_.inputs <= kMostInputs, name, ": expected at most ", kMostInputs, " inputs, got ",
            stage_.inputs);
    stage_.weight = signs_of(file, name + ".weight", stage_.outputs, stage_.inputs);
    if (!stage_.real) return;
    groups_ = grouped(stage_.weight, stage_.outputs, stage_.inputs);
    stage_.groups = groups_.data();
  }

  Flow flow(const Flow& before) const override {
    require_units(before, stage_.inputs, name_);
    require(stage_.real ? before.input : before.bits, name_, ": expected ",
            stage_.real ? "real inputs at the first product" : "a sign layer before it");
    return {stage_.outputs, false, true, false, false, false};
  }
  int64_t steps() const override { return stage_.steps(); }
  void run(State& state, const Call& call) const override { stage_.run(state, call); }

 private:
  std::string name_;
  Product stage_;
  std::vector<uint16_t> groups_;
};

class ConvolutionLayer : public Layer {
 public:
  ConvolutionLayer(const Json& fields, const std::string& name, File& file) : name_(name), stage_{} {
    stage_.window = window_of(fields, name);
    stage_.outputs = size_field(fields, "outputs", name);
    stage_.real = fields.at("real", name).flag(name);
    const Window& window = stage_.window;
    require(stage_.outputs % window.groups == 0, name, ".outputs: expected a multiple of ", window.groups,
            " groups, got ", stage_.outputs);
    image_units(out_pixels(window), stage_.outputs, name);
    stage_.weight = signs_of(file, name + ".weight", stage_.outputs, group_units(window));
    if (!stage_.real) return;
    require(window.groups == 1, name, ".window: expected one group of real inputs, got ", window.groups);
    require(group_units(window) <= kMostInputs, name, ": expected at most ", kMostInputs, " inputs, got ",
            group_units(window));
    groups_ = grouped(stage_.weight, stage_.outputs, group_units(window));
    stage_.groups = groups_.data();
  }

  Flow flow(const Flow& before) const override {
    require_units(before, engram::units(stage_.window), name_);
    require(stage_.real ? before.input : before.bits, name_, ": expected ",
            stage_.real ? "real inputs at the first product" : "a sign layer before it");
    return {stage_.units(), false, true, false, false, false};
  }
  int64_t steps() const override { return stage_.steps(); }
  void run(State& state, const Call& call) const override { stage_.run(state, call); }

 private:
  std::string name_;
  Convolution stage_;
  std::vector<uint16_t> groups_;
};

class MaxPoolLayer : public Layer {
 public:
  MaxPoolLayer(const Json& fields, const std::string& name, File& file)
      : name_(name), stage_{window_of(fields, name), nullptr} {
    const Window& window = stage_.window;
    require(window.groups == 1, name, ".window: expected one group, got ", window.groups);
    const int64_t units = image_units(out_pixels(window), window.channels, name);
    if (!file.has(name + ".flip")) return;
    flip_bits_ = flips_of(file, name + ".flip", window.channels, units);
    stage_.flip_bits = flip_bits_.data();
  }

  Flow flow(const Flow& before) const override {
    require_units(before, engram::units(stage_.window), name_);
    require(before.bits, name_, ": expected a sign layer before it");
    return {stage_.units(), false, false, true, false, false};
  }
  int64_t steps() const override { return stage_.steps(); }
  void run(State& state, const Call& call) const override { stage_.run(state, call); }

 private:
  std::string name_;
  MaxPool stage_;
  std::vector<uint64_t> flip_bits_;
};

class TransposeLayer : public Layer {
 public:
  TransposeLayer(const Json& fields, const std::string& name)
      : name_(name), stage_{size_field(fields, "rows", name), size_field(fields, "columns", name)} {
    image_units(stage_.rows, stage_.columns, name);
  }

  Flow flow(const Flow& before) const override {
    require_units(before, stage_.rows * stage_.columns, name_);
    require_values(before, name_);
    Flow after = before;
    after.bits = after.gate = false;
    return after;
  }
  int64_t steps() const override { return stage_.steps(); }
  void run(State& state, const Call& call) const override { stage_.run(state, call); }

 private:
  std::string name_;
  Transpose stage_;
};

class SignLayer : public StageLayer<Sign> {
 public:
  SignLayer(const Json& fields, const std::string& name, File& file) : StageLayer(fields, name) {
    const std::string& by = fields.at("by", name).string(name);
    require(by == "threshold" || by == "mean", name, ": expected by threshold or by mean, got ", by);
    stage_.by_mean = by == "mean";
    stage_.period = units_;
    if (stage_.by_mean) return;
    const int64_t channels = std::max<int64_t>(1, file.rows_of(name + ".flip"));
    require(units_ % channels == 0, name, ".flip: expected a size that divides ", units_, ", got ", channels);
    stage_.period = channels == units_ ? units_ : threshold_period(channels, units_);
    flip_bits_ = flips_of(file, name + ".flip", channels, stage_.period);
    stage_.flip_bits = flip_bits_.data();
    if (file.has_dtype(name + ".threshold", "I32")) {
      repeat(file.tensor<int32_t>(name + ".threshold", "I32", {channels}), channels, whole_);
      stage_.threshold = whole_.data();
      return;
    }
    repeat(file.tensor<float>(name + ".threshold", "F32", {channels}), channels, real_);
    stage_.real = real_.data();
    for (const float real : real_) {
      require(!std::isnan(real), name, ".threshold: expected numbers, got NaN");
      const double least = std::ceil(static_cast<double>(real));
      whole_.push_back(static_cast<int32_t>(std::min<double>(INT32_MAX, std::max<double>(INT32_MIN, least))));
    }
    stage_.threshold = whole_.data();
  }

 private:
  template <typename T>
  void repeat(const T* of_channels, int64_t channels, std::vector<T>& all) const {
    for (int64_t n = 0; n < stage_.period; ++n) all.push_back(of_channels[n % channels]);
  }

  std::vector<int32_t> whole_;
  std::vector<float> real_;
  std::vector<uint64_t> flip_bits_;
};

class RecruitLayer : public StageLayer<Recruit> {
 public:
  RecruitLayer(const Json& fields, const std::string& name) : StageLayer(fields, name) {
    stage_.count = size_field(fields, "recruited", name);
    require(stage_.count <= units_, name, ": expected at most ", units_, " recruited units, got ", stage_.count);
    const std::string& score = fields.at("score", name).string(name);
    const char* const names[] = {"value", "magnitude", "standardised", "distance"};
    const auto found = std::find(std::begin(names), std::end(names), score);
    require(found != std::end(names), name, ": expected score value, magnitude, standardised or distance, got ", score);
    stage_.score = static_cast<Score>(found - names);
  }
};

class GateLayer : public StageLayer<Gate> {
 public:
  GateLayer(const Json& fields, const std::string& name, File& file) : StageLayer(fields, name) {
    stage_.gate = reinterpret_cast<const uint64_t*>(file.tensor<int64_t>(name + ".gate", "I64", {words_for(units_)}));
  }
};

class AffineLayer : public StageLayer<Affine> {
 public:
  AffineLayer(const Json& fields, const std::string& name, File& file) : StageLayer(fields, name) {
    for (const Json& factor : fields.at("factors", name).list(name))
      factors_.push_back(static_cast<float>(factor.number(name)));
    stage_.factors = factors_.data(), stage_.factor_count = static_cast<int64_t>(factors_.size());
    if (file.has(name + ".scale")) stage_.scale = file.tensor<float>(name + ".scale", "F32", {units_});
    if (file.has(name + ".shift")) stage_.shift = file.tensor<float>(name + ".shift", "F32", {units_});
    require(stage_.scale == nullptr || stage_.shift != nullptr, name,
            ".shift: expected a tensor beside a scale, got none");
  }

 private:
  std::vector<float> factors_;
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
  if (kind == "product") return std::make_unique<ProductLayer>(description, name, file);
  if (kind == "convolution") return std::make_unique<ConvolutionLayer>(description, name, file);
  if (kind == "max_pool") return std::make_unique<MaxPoolLayer>(description, name, file);
  if (kind == "transpose") return std::make_unique<TransposeLayer>(description, name);
  if (kind == "sign") return std::make_unique<SignLayer>(description, name, file);
  if (kind == "recruit") return std::make_unique<RecruitLayer>(description, name);
  if (kind == "gate") return std::make_unique<GateLayer>(description, name, file);
  if (kind == "affine") return std::make_unique<AffineLayer>(description, name, file);
  std::unique_ptr<Layer> readout = make_readout(description, name, file);
  require(readout != nullptr, name, ": expected a kind of layer of this version, got ", kind);
  return readout;
}

}  // namespace engram::runtime
