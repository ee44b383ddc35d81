// Read-outs: scores of engrams, and what those that are counted learn.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/bits.h"
#include "runtime/cholesky.h"
#include "runtime/error.h"
#include "runtime/layers.h"

namespace engram::runtime {
namespace {

int64_t popcount(const uint64_t* bits, int64_t units) {
  int64_t count = 0;
  for (int64_t word = 0; word < words_for(units); ++word)
    count += __builtin_popcountll(bits[word] & valid_bits(word, units));
  return count;
}

class Readout : public Layer {
 public:
  Readout(const Json& fields, const std::string& name)
      : name_(name),
        inputs_(size_field(fields, "inputs", name)),
        classes_(size_field(fields, "classes", name)),
        recruited_(size_field(fields, "recruited", name)) {
    require(recruited_ <= inputs_, name, ": expected at most ", inputs_, " recruited units, got ", recruited_);
  }

  Flow flow(const Flow& before) const override {
    require(!before.scores, name_, ": expected nothing behind a read-out");
    require(before.units == inputs_, name_, ": expected ", before.units, " inputs, as come from before it, got ",
            inputs_);
    require(before.gate, name_, ": expected a layer before it that recruits");
    return {classes_, false, true, false, false, true};
  }

 protected:
  std::string name_;
  int64_t inputs_, classes_, recruited_;
};

class DendriticLayer : public Readout {
 public:
  DendriticLayer(const Json& fields, const std::string& name, File& file) : Readout(fields, name), stage_{} {
    const int64_t segments = size_field(fields, "segments", name), top = size_field(fields, "top_segments", name);
    require(top <= segments, name, ": expected at most ", segments, " top segments, got ", top);
    int64_t rows;
    require(!__builtin_mul_overflow(classes_, segments, &rows), name, ": expected fewer segments, got ", segments);
    const auto* weight =
        reinterpret_cast<const uint64_t*>(file.tensor<int64_t>(name + ".weight", "I64", {rows, words_for(inputs_)}));
    const auto rate = static_cast<float>(fields.at("rate", name).number(name + ".rate"));
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t sum = 2 * popcount(weight + row * words_for(inputs_), inputs_) - inputs_;
      mean_product_.push_back(rate * static_cast<float>(sum));
    }
    stage_ = {inputs_, classes_, segments, top, recruited_, weight, mean_product_.data()};
  }

  int64_t steps() const override { return stage_.steps(); }
  void run(State& state, const Call& call) const override { stage_.run(state, call); }

 private:
  Dendritic stage_;
  std::vector<float> mean_product_;  // rate times the sum of a segment's signs
};

// Counts of the samples of each class, and of how often each recruits each unit.
class Counts : public Readout, public CountedReadout {
 public:
  Counts(const Json& fields, const std::string& name, File& file) : Readout(fields, name) {
    samples_ = file.tensor<int64_t>(name + ".samples", "I64", {classes_});
    for (int64_t c = 0; c < classes_; ++c)
      require(samples_[c] >= 0 && samples_[c] <= INT32_MAX, name, ".samples: expected 0 to 2^31 - 1, got ",
              samples_[c]);
    if (file.has(name + ".counts")) counts_ = file.tensor<int32_t>(name + ".counts", "I32", {classes_, inputs_});
  }

  void count(const uint64_t* gates, const int64_t* classes, int64_t samples, const Call&) override {
    require(counts_ != nullptr, "expected a model that was saved with its counts, to go on learning");
    int64_t total = samples;
    for (int64_t c = 0; c < classes_; ++c) total += samples_[c];
    require(total <= INT32_MAX, "samples: expected at most 2^31 - 1 in all, got ", total);
    for (int64_t i = 0; i < samples; ++i) {
      ++samples_[classes[i]];
      int32_t* counts = counts_ + classes[i] * inputs_;
      for (int64_t k = 0; k < inputs_; ++k) counts[k] += recruits(gates + i * words_for(inputs_), k);
    }
  }

 protected:
  static int32_t recruits(const uint64_t* gate, int64_t k) {
    return static_cast<int32_t>(gate[k / kWordBits] >> k % kWordBits & 1);
  }
  double mean_of_class(int64_t c, int64_t k) const {
    return static_cast<double>(counts_[c * inputs_ + k]) / static_cast<double>(std::max<int64_t>(1, samples_[c]));
  }

  int64_t* samples_;
  int32_t* counts_ = nullptr;
};

class PrototypeLayer : public Counts {
 public:
  PrototypeLayer(const Json& fields, const std::string& name, File& file) : Counts(fields, name, file) {
    require(counts_ != nullptr, name, ".counts: expected a tensor, got none");
    derive();
  }

  void derive() override {
    const int64_t words = words_for(inputs_);
    bits_.assign(static_cast<size_t>(classes_ * words), 0);
    std::vector<double> offset(static_cast<size_t>(classes_), 0.0);
    const int64_t seen = classes_ - std::count(samples_, samples_ + classes_, 0);
    for (int64_t k = 0; k < inputs_; ++k) {
      double mean = 0;
      for (int64_t c = 0; c < classes_; ++c) mean += mean_of_class(c, k);
      mean /= static_cast<double>(std::max<int64_t>(1, seen));
      for (int64_t c = 0; c < classes_; ++c) {
        const bool above =
            mean_of_class(c, k) - mean > -1e-12;  // equal shares may differ from their mean in its last bit
        bits_[static_cast<size_t>(c * words + k / kWordBits)] |= uint64_t{above} << k % kWordBits;
        offset[static_cast<size_t>(c)] += above ? mean : -mean;
      }
    }
    offset_.assign(offset.begin(), offset.end());
  }

  int64_t steps() const override { return stage().steps(); }
  void run(State& state, const Call& call) const override { stage().run(state, call); }

 private:
  Prototype stage() const { return {inputs_, classes_, recruited_, bits_.data(), offset_.data(), samples_}; }

  std::vector<uint64_t> bits_;
  std::vector<float> offset_;
};

class RidgeLayer : public Counts {
 public:
  RidgeLayer(const Json& fields, const std::string& name, File& file)
      : Counts(fields, name, file), penalty_(fields.at("penalty", name).number(name + ".penalty")) {
    require(penalty_ > 0, name, ".penalty: expected above 0");
    weight_ = file.tensor<float>(name + ".weight", "F32", {classes_, inputs_});
    bias_ = file.tensor<float>(name + ".bias", "F32", {classes_});
    if (file.has(name + ".gram")) gram_ = file.tensor<int32_t>(name + ".gram", "I32", {inputs_, inputs_});
    sum_weights();
  }

  void count(const uint64_t* gates, const int64_t* classes, int64_t samples, const Call& call) override {
    require(gram_ != nullptr, "expected a model that was saved with its pairs of units (gram), to go on learning");
    Counts::count(gates, classes, samples, call);
    for (int64_t begin = 0; begin < samples; begin += kCountedTogether) {
      call.memory.clear();
      count_pairs(gates + begin * words_for(inputs_), std::min(kCountedTogether, samples - begin), call);
    }
  }

  void derive() override {
    const size_t units = static_cast<size_t>(inputs_);
    double samples = 0;
    for (int64_t c = 0; c < classes_; ++c) samples += static_cast<double>(samples_[c]);
    samples = std::max(1.0, samples);
    std::vector<double> mean(units, 0.0), matrix(units * units), solution(static_cast<size_t>(classes_) * units);
    for (int64_t c = 0; c < classes_; ++c)
      for (size_t k = 0; k < units; ++k) {
        mean[k] += counts_[static_cast<size_t>(c) * units + k];
        solution[static_cast<size_t>(c) * units + k] = mean_of_class(c, static_cast<int64_t>(k));
      }
    for (double& value : mean) value /= samples;
    double variance = 0;
    for (size_t i = 0; i < units; ++i) {
      for (size_t k = 0; k < units; ++k) matrix[i * units + k] = gram_[i * units + k] / samples - mean[i] * mean[k];
      variance += matrix[i * units + i];
    }
    const double shift = penalty_ * variance / static_cast<double>(units) + 1e-12;  // a unit of all samples has none
    for (size_t k = 0; k < units; ++k) matrix[k * units + k] += shift;
    require(factorise(matrix.data(), inputs_), name_,
            ": expected moments of the same samples, got ones without solution");
    for (int64_t c = 0; c < classes_; ++c) {
      double* w = solution.data() + static_cast<size_t>(c) * units;
      solve(matrix.data(), inputs_, w);
      double product = 0;
      for (int64_t k = 0; k < inputs_; ++k) {
        product += w[k] * mean_of_class(c, k);
        weight_[c * inputs_ + k] = static_cast<float>(w[k]);
      }
      bias_[c] = static_cast<float>(-0.5 * product);
    }
    sum_weights();
  }

  int64_t steps() const override { return stage().steps(); }
  void run(State& state, const Call& call) const override { stage().run(state, call); }

 private:
  static constexpr int64_t kCountedTogether = 4096;  // samples: each product is of all pairs of units

  // With the gates of each unit over the samples packed as bits u, pairs that both are recruited are
  // (y - samples) / 4 + (popcount(u[i]) + popcount(u[k])) / 2, where y is their product as signs.
  void count_pairs(const uint64_t* gates, int64_t samples, const Call& call) {
    const int64_t words = words_for(samples);
    auto* by_unit = call.memory.get<uint64_t>(inputs_ * words);
    cpu::transpose_bits(call.kernels, {gates, samples, inputs_, by_unit});
    auto* own = call.memory.get<int32_t>(inputs_);
    for (int64_t k = 0; k < inputs_; ++k) own[k] = static_cast<int32_t>(popcount(by_unit + k * words, samples));
    auto* y = call.memory.get<int32_t>(inputs_ * inputs_);
    BinaryMatmul p{};
    p.x = by_unit, p.w = by_unit, p.y = y;
    p.M = inputs_, p.N = inputs_, p.K = samples, p.words = words;
    cpu::binary_matmul(call.kernels, p);
    const auto m = static_cast<int32_t>(samples);
    for (int64_t i = 0; i < inputs_; ++i)
      for (int64_t k = 0; k < inputs_; ++k)
        gram_[i * inputs_ + k] += (y[i * inputs_ + k] - m + 2 * (own[i] + own[k])) / 4;
  }

  Ridge stage() const { return {inputs_, classes_, weight_, bias_, weight_sums_.data(), samples_}; }

  void sum_weights() {
    weight_sums_.clear();
    for (int64_t c = 0; c < classes_; ++c) {
      double sum = 0;
      for (int64_t k = 0; k < inputs_; ++k) sum += weight_[c * inputs_ + k];
      weight_sums_.push_back(static_cast<float>(sum));
    }
  }

  double penalty_;
  float *weight_, *bias_;
  int32_t* gram_ = nullptr;
  std::vector<float> weight_sums_;
};

}  // namespace

std::unique_ptr<Layer> make_readout(const Json& description, const std::string& name, File& file) {
  const std::string& kind = description.at("kind", name).string(name + ".kind");
  if (kind == "dendritic") return std::make_unique<DendriticLayer>(description, name, file);
  require(kind != "learning dendritic", name,
          ": expected a read-out that this library has, got one of kind learning dendritic; pack the model without "
          "its optimizer");
  if (kind == "prototype") return std::make_unique<PrototypeLayer>(description, name, file);
  if (kind == "ridge") return std::make_unique<RidgeLayer>(description, name, file);
  return nullptr;
}

}  // namespace engram::runtime
