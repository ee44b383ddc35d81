// A packed network: its layers in order, as docs/packed-format.md defines them.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "runtime/file.h"
#include "runtime/stages.h"

namespace engram::runtime {

// What is known of the state before a network has run.
struct Flow {
  int64_t units;
  bool input, values, bits, gate, scores;
};

class Layer {
 public:
  virtual ~Layer() = default;
  // Raises: Error where the layer cannot stand there.
  virtual Flow flow(const Flow& before) const = 0;
  virtual int64_t steps() const = 0;  // as Stage's
  virtual void run(State& state, const Call& call) const = 0;
};

// The last layer of a network that learns: counts of engrams.
class CountedReadout {
 public:
  virtual ~CountedReadout() = default;
  // Gates [samples, words], class numbers [samples]. Raises: Error, with nothing counted.
  virtual void count(const uint64_t* gates, const int64_t* classes, int64_t samples, const Call& call) = 0;
  // Makes scores follow from the counts.
  virtual void derive() = 0;
};

class Network {
 public:
  // Layers are what a list of the file's JSON says, tensors those of the file. Raises: Error that names the layer.
  Network(int64_t features, const Json& layers, File& file);

  int64_t features() const { return features_; }
  int64_t classes() const { return classes_; }
  // x [samples, features], float32 or uint8; scores [samples, classes].
  void predict(const void* x, Type type, int64_t samples, float* scores, const cpu::Runtime& runtime) const;
  // Classes [samples].
  void learn(const void* x, Type type, int64_t samples, const int64_t* classes, const Call& call);

 private:
  // Calls `take` with what the first layers make of samples [begin, begin + its samples).
  void run(const void* x, Type type, int64_t samples, size_t layers, const cpu::Runtime& runtime,
           const std::function<void(int64_t begin, const State&)>& take) const;
  void check_input(const void* x, Type type, int64_t samples) const;

  int64_t features_, classes_ = 0;
  int64_t widest_ = 0, steps_ = 0;  // units of the widest values; of all layers
  bool takes_bytes_ = false;
  std::vector<std::unique_ptr<Layer>> layers_;
  CountedReadout* readout_ = nullptr;  // the last layer, if it is one
  int64_t readout_units_ = 0;          // that come into the last layer
};

}  // namespace engram::runtime
