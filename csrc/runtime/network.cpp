#include "runtime/network.h"

#include <algorithm>
#include <cmath>

#include "core/bits.h"
#include "runtime/error.h"
#include "runtime/layers.h"

namespace engram::runtime {
Network::Network(int64_t features, const Json& layers, File& file) : features_(features) {
  Flow flow{features, true, true, false, false, false};
  int64_t number = 0;
  for (const Json& description : layers.list("layers")) {
    readout_units_ = flow.units;
    layers_.push_back(make_layer(description, std::to_string(number), file));
    flow = layers_.back()->flow(flow);
    widest_ = std::max(widest_, flow.units);
    steps_ += layers_.back()->steps();
    ++number;
  }
  require(!layers_.empty(), "layers: expected at least one, got none");
  require(flow.values, "layers: expected values at the end, got signs alone");
  classes_ = flow.units;
  for (const Json& description : layers.list("layers")) {
    const std::string& kind = description.at("kind", "layers").string("kind");
    if (kind == "transpose") continue;
    takes_bytes_ = kind != "sign";
    break;
  }
  readout_ = dynamic_cast<CountedReadout*>(layers_.back().get());
}

void Network::run(const void* x, Type type, int64_t samples, size_t layers, const cpu::Runtime& runtime,
                  const std::function<void(int64_t begin, const State&)>& take) const {
  const int64_t row = features_ * (type == Type::kUint8 ? 1 : 4);
  share_samples(runtime, samples, steps_, widest_, [&](int64_t begin, int64_t count, const Call& call) {
    const uint8_t* from = static_cast<const uint8_t*>(x) + begin * row;
    State state{count, {from, type, features_, type == Type::kUint8 ? 255 : 0}, nullptr, nullptr, 0};
    for (size_t i = 0; i < layers; ++i) layers_[i]->run(state, call);
    take(begin, state);
  });
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

void Network::predict(const void* x, Type type, int64_t samples, float* scores, const cpu::Runtime& runtime) const {
  check_input(x, type, samples);
  run(x, type, samples, layers_.size(), runtime, [&](int64_t begin, const State& state) {
    float* out = scores + begin * classes_;
    const int64_t count = state.samples * classes_;
    if (state.y.type == Type::kFloat32)
      std::copy_n(static_cast<const float*>(state.y.data), count, out);
    else if (state.y.type == Type::kInt32)
      std::copy_n(static_cast<const int32_t*>(state.y.data), count, out);
    else
      std::copy_n(static_cast<const uint8_t*>(state.y.data), count, out);
  });
}

void Network::learn(const void* x, Type type, int64_t samples, const int64_t* classes, const Call& call) {
  require(readout_ != nullptr, "expected a model with a counted read-out (prototype or ridge), got another");
  check_input(x, type, samples);
  for (int64_t i = 0; i < samples; ++i)
    require(classes[i] >= 0 && classes[i] < classes_, "class_numbers: expected 0 to ", classes_ - 1, ", got ",
            classes[i]);
  // of all samples, so that whatever fails does so before the first is counted
  const int64_t words = words_for(readout_units_);
  std::vector<uint64_t> gates(static_cast<size_t>(samples * words));
  run(x, type, samples, layers_.size() - 1, call.kernels, [&](int64_t begin, const State& state) {
    for (int64_t i = 0; i < state.samples; ++i)
      std::copy_n(state.gate + i * state.gate_stride, words, gates.data() + (begin + i) * words);
  });
  readout_->count(gates.data(), classes, samples, call);
  readout_->derive();
}

}  // namespace engram::runtime
