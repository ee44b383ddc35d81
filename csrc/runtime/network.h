// A packed network: its layers in order, as docs/packed-format.md defines them.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "runtime/file.h"
#include "runtime/threads.h"

namespace engram::runtime {

enum class Type { kFloat32, kInt32, kUint8 };

// Numbers of a batch, (samples, units).
struct Values {
  const void* data;
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
};

// What is known of the state before a network has run.
struct Flow {
  int64_t units;
  bool input, bits, gate, scores;
};

class Layer {
 public:
  virtual ~Layer() = default;
  // Raises: Error where the layer cannot stand there.
  virtual Flow flow(const Flow& before) const = 0;
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
  void predict(const void* x, Type type, int64_t samples, float* scores, const Call& call) const;
  // Classes [samples].
  void learn(const void* x, Type type, int64_t samples, const int64_t* classes, const Call& call);

 private:
  State run(const void* x, Type type, int64_t samples, size_t layers, const Call& call) const;

  void check_input(const void* x, Type type, int64_t samples) const;

  int64_t features_, classes_ = 0;
  bool takes_bytes_ = false;
  std::vector<std::unique_ptr<Layer>> layers_;
  CountedReadout* readout_ = nullptr;  // the last layer, if it is one
};

}  // namespace engram::runtime
