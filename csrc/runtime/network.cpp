#include "runtime/network.h"

#include <algorithm>
#include <cmath>

#include "core/bits.h"
#include "runtime/error.h"
#include "runtime/layers.h"

namespace engram::runtime {
namespace {

constexpr int64_t kSamples = 256;  // whose activations are held at a time

}  // namespace

Network::Network(int64_t features, const Json& layers, File& file) : features_(features) {
  Flow flow{features, true, false, false, false};
  int64_t number = 0;
  for (const Json& description : layers.list("layers")) {
    layers_.push_back(make_layer(description, std::to_string(number), file));
    flow = layers_.back()->flow(flow);
    ++number;
  }
  require(!layers_.empty(), "layers: expected at least one, got none");
  classes_ = flow.units;
  takes_bytes_ = layers.list("layers")[0].at("kind", "0").string("0.kind") != "sign";
  readout_ = dynamic_cast<CountedReadout*>(layers_.back().get());
}

State Network::run(const void* x, Type type, int64_t samples, size_t layers, const Call& call) const {
  State state{samples, {x, type, features_, type == Type::kUint8 ? 255 : 0}, nullptr, nullptr, 0};
  for (size_t i = 0; i < layers; ++i) layers_[i]->run(state, call);
  return state;
}

static const void* rows_from(const void* x, Type type, int64_t row, int64_t features) {
  const int64_t size = type == Type::kUint8 ? 1 : 4;
  return static_cast<const uint8_t*>(x) + row * features * size;
}

void Network::check_input(const void* x, Type type, int64_t samples) const {
  require(type == Type::kFloat32 || takes_bytes_,
          "type: expected float32, of which the first layer takes the signs, got uint8");
  if (type == Type::kUint8) return;
  const auto* numbers = static_cast<const float*>(x);
  for (int64_t i = 0; i < samples * features_; ++i)
    require(!std::isnan(numbers[i]), "x: expected numbers, got NaN in sample ", i / features_, ", feature ",
            i % features_);
}

void Network::predict(const void* x, Type type, int64_t samples, float* scores, const Call& call) const {
  check_input(x, type, samples);
  for (int64_t begin = 0; begin < samples; begin += kSamples) {
    call.memory.clear();
    const int64_t count = std::min(kSamples, samples - begin);
    const State state = run(rows_from(x, type, begin, features_), type, count, layers_.size(), call);
    float* out = scores + begin * classes_;
    if (state.y.type == Type::kFloat32)
      std::copy_n(static_cast<const float*>(state.y.data), count * classes_, out);
    else if (state.y.type == Type::kInt32)
      std::copy_n(static_cast<const int32_t*>(state.y.data), count * classes_, out);
    else
      std::copy_n(static_cast<const uint8_t*>(state.y.data), count * classes_, out);
  }
}

void Network::learn(const void* x, Type type, int64_t samples, const int64_t* classes, const Call& call) {
  require(readout_ != nullptr, "expected a model with a counted read-out (prototype or ridge), got another");
  check_input(x, type, samples);
  for (int64_t i = 0; i < samples; ++i)
    require(classes[i] >= 0 && classes[i] < classes_, "class_numbers: expected 0 to ", classes_ - 1, ", got ",
            classes[i]);
  std::vector<uint64_t> gates;  // of all samples, so that whatever fails does so before the first is counted
  for (int64_t begin = 0; begin < samples; begin += kSamples) {
    call.memory.clear();
    const int64_t count = std::min(kSamples, samples - begin);
    const State state = run(rows_from(x, type, begin, features_), type, count, layers_.size() - 1, call);
    const int64_t words = words_for(state.y.units);
    for (int64_t i = 0; i < count; ++i) {
      const uint64_t* gate = state.gate + i * state.gate_stride;
      gates.insert(gates.end(), gate, gate + words);
    }
  }
  readout_->count(gates.data(), classes, samples, call);
  readout_->derive();
}

}  // namespace engram::runtime
