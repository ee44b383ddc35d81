// A packed network from its first product on, as one operator: csrc/runtime runs it. On the CPU; elsewhere and for
// layers that have no stage the package runs them one by one.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "bindings/tensors.h"
#include "core/window_check.h"
#include "runtime/stages.h"

namespace engram::bindings {

namespace {

using runtime::Call;
using runtime::Stage;
using runtime::State;
using runtime::Type;

// As reference.PACKED_STAGES numbers them.
enum Kind : int64_t {
  kProduct,
  kSignByMean,
  kSignByThreshold,
  kRecruit,
  kGate,
  kAffine,
  kDendritic,
  kPrototype,
  kRidge,
  kConvolution,
  kMaxPool,
  kTranspose
};

// Reads stages from the arguments of the operator: numbers and tensors in the order in which stages name them.
class Reader {
 public:
  Reader(const std::vector<int64_t>& layout, const std::vector<double>& factors, std::vector<Tensor>& tensors,
         const Place& place)
      : layout_(layout), tensors_(tensors), place_(place), factors_(factors.begin(), factors.end()) {
    require(!layout.empty() && (layout[0] == kProduct || layout[0] == kConvolution),
            "layout: expected a product or a convolution as the first stage, got ",
            layout.empty() ? "nothing" : "another");
    require(place.cpu, "x: expected a tensor on cpu, got one on ", place);
  }

  // All stages; each is checked to fit the one before.
  std::vector<Stage> read() {
    std::vector<Stage> stages;
    while (at_ < layout_.size()) {
      require(!scores_, "layout: expected nothing after a read-out, got stage ", layout_[at_]);
      stages.push_back(stage());
      steps += std::visit([](const auto& s) { return s.steps(); }, stages.back());
    }
    require(tensor_ == tensors_.size(), "tensors: expected ", tensor_, ", got ", tensors_.size());
    require(factor_ == static_cast<int64_t>(factors_.size()), "factors: expected ", factor_, ", got ", factors_.size());
    require(gives_gate || values_, "layout: expected a stage that makes values at the end, got signs alone");
    return stages;
  }

  int64_t inputs = 0;  // of the first stage
  bool real = false;   // whether that takes bytes
  int64_t units = 0, widest = 0, steps = 0;
  bool gives_gate = false;  // rather than values

 private:
  Stage stage() {
    const int64_t kind = next(0, kTranspose);
    require(values_ || kind == kProduct || kind == kConvolution || kind == kMaxPool || kind == kGate,
            "layout: expected values before stage ", kind, ", got signs alone");
    gives_gate = kind == kRecruit || kind == kGate;
    switch (kind) {
      case kProduct:
        return product();
      case kConvolution:
        return convolution();
      case kMaxPool:
        return max_pool();
      case kTranspose: {
        runtime::Transpose p{next(1, units), 0};
        p.columns = next(1, units);
        require(p.rows * p.columns == units, "layout: expected a transpose of ", units, " units, got ", p.rows, " x ",
                p.columns);
        bits_ = gate_ = false;
        return p;
      }
      case kSignByMean:
        return sign(units, nullptr, nullptr);
      case kSignByThreshold: {
        const Tensor& threshold = take(ScalarType::Int, {-1});
        const int64_t period = threshold.size(0);
        require(period == units || (period > 0 && period % kRowBits == 0 && units % period == 0), "tensors[",
                tensor_ - 1, "]: expected thresholds of ", units, " units, or of a multiple of ", kRowBits,
                " that divides them, got ", describe(threshold));
        const Tensor& flip_bits = take(ScalarType::Long, {words_for(period)});
        return sign(period, static_cast<const int32_t*>(threshold.const_data_ptr()), packed_data(flip_bits));
      }
      case kRecruit: {
        const int64_t count = next(1, units), score = next(0, 3);
        require(whole_ || score < 2, "layout: expected a score of float32 by value or magnitude, got ", score);
        gate_ = true;
        return runtime::Recruit{units, count, static_cast<runtime::Score>(score)};
      }
      case kGate:
        gate_ = true;
        return runtime::Gate{units, packed_data(take(ScalarType::Long, {words_for(units)}))};
      case kAffine:
        return affine();
      default:
        return readout(kind);
    }
  }

  Stage product() {
    runtime::Product p{};
    p.inputs = next(1, INT32_MAX), p.real = next(0, 1) == 1;
    begin_product(p.inputs, p.real);
    const Tensor& weight = signs(p.inputs, p.real, p.groups);
    p.outputs = weight.size(0), p.weight = packed_data(weight);
    end_product(p.outputs);
    return p;
  }

  Stage convolution() {
    runtime::Convolution p{};
    p.window = window(), p.real = next(0, 1) == 1;
    require(!p.real || p.window.groups == 1, "layout: expected one group of a convolution of uint8, got ",
            p.window.groups);
    begin_product(engram::units(p.window), p.real);
    const Tensor& weight = signs(group_units(p.window), p.real, p.groups);
    p.outputs = weight.size(0), p.weight = packed_data(weight);
    require(p.outputs % p.window.groups == 0 && p.outputs <= INT32_MAX / out_pixels(p.window),
            "tensors: expected filters that ", p.window.groups,
            " groups share out evenly, of at most 2^31 - 1 outputs in all, got ", describe(weight));
    end_product(p.units());
    return p;
  }

  Stage max_pool() {
    runtime::MaxPool p{window(), nullptr};
    require(bits_ && p.window.groups == 1 && engram::units(p.window) == units,
            "layout: expected a max_pool of one group of the signs of ", units, " units, got one of ",
            engram::units(p.window));
    require(p.window.channels <= INT32_MAX / out_pixels(p.window),
            "layout: expected a max_pool of at most 2^31 - 1 units");
    units = p.units();
    if (next(0, 1) == 1) p.flip_bits = packed_data(take(ScalarType::Long, {words_for(units)}));
    values_ = gate_ = false;
    return p;
  }

  Window window() {
    Window w{};
    for (const WindowField& field : kWindowFields) w.*field.number = next(field.least, INT32_MAX);
    const std::string fault = window_fault(w);
    require(fault.empty(), "layout: ", fault);
    return w;
  }

  // The signs of a product, which the groups follow where it is real.
  const Tensor& signs(int64_t of, bool of_numbers, const uint16_t*& groups) {
    require(!of_numbers || of <= INT32_MAX / 255 / 4, "layout: expected at most ", INT32_MAX / 255 / 4,
            " inputs of uint8, got ", of);
    const Tensor& weight = take(ScalarType::Long, {-1, words_for(of)});
    const int64_t outputs = weight.size(0);
    require(outputs >= 1 && outputs <= INT32_MAX, "tensors[", tensor_ - 1, "]: expected 1 to 2^31 - 1 rows, got ",
            describe(weight));
    if (of_numbers) {
      const int64_t stride = ceil_div(outputs, kGroupedRows) * kGroupedRows;
      const Tensor& own = take(ScalarType::Short, {ceil_div(of, kGroup), stride});
      groups = static_cast<const uint16_t*>(own.const_data_ptr());
    }
    return weight;
  }

  void begin_product(int64_t of, bool of_numbers) {
    const bool first = units == 0;
    require(first || of == units, "layout: expected a product of ", units, " inputs, got ", of);
    require(first || (bits_ && !of_numbers), "layout: expected signs before each product but the first, got none");
    if (first) inputs = of, real = of_numbers;
  }

  void end_product(int64_t outputs) {
    units = outputs, widest = std::max(widest, units);
    whole_ = values_ = true, bits_ = gate_ = false;
  }

  Stage sign(int64_t period, const int32_t* threshold, const uint64_t* flip_bits) {
    require(units > 0 && whole_, "layout: expected integers before a stage of signs, got float32");
    bits_ = true;
    return runtime::Sign{units, period, threshold == nullptr, threshold, nullptr, flip_bits};
  }

  Stage affine() {
    const int64_t count = next(0, static_cast<int64_t>(factors_.size()) - factor_);
    const bool scaled = next(0, 1) == 1, shifted = next(0, 1) == 1;
    require(shifted || !scaled, "layout: expected a shift beside a scale, got none");
    runtime::Affine p{};
    p.units = units, p.factors = factors_.data() + factor_, p.factor_count = count;
    factor_ += count;
    if (scaled) p.scale = float_data(take(ScalarType::Float, {units}));
    if (shifted) p.shift = float_data(take(ScalarType::Float, {units}));
    whole_ = false;
    return p;
  }

  Stage readout(int64_t kind) {
    require(gate_, "layout: expected a gate before a read-out, got none");
    const int64_t inputs = units, words = words_for(units);
    scores_ = true;
    if (kind == kDendritic) {
      const int64_t segments = next(1, INT32_MAX), recruited = next(1, inputs);
      const Tensor& weight = take(ScalarType::Long, {-1, words});
      require(weight.size(0) >= 1 && weight.size(0) % segments == 0, "tensors[", tensor_ - 1,
              "]: expected a multiple of ", segments, " rows, got ", describe(weight));
      const Tensor& mean = take(ScalarType::Float, {weight.size(0)});
      units = weight.size(0) / segments;
      return runtime::Dendritic{inputs, units, segments, 1, recruited, packed_data(weight), float_data(mean)};
    }
    if (kind == kPrototype) {
      const int64_t recruited = next(1, inputs);
      const Tensor& bits = take(ScalarType::Long, {-1, words});
      units = bits.size(0);
      const Tensor &offset = take(ScalarType::Float, {units}), &samples = take(ScalarType::Long, {units});
      return runtime::Prototype{inputs, units, recruited, packed_data(bits), float_data(offset), integers(samples)};
    }
    const Tensor& weight = take(ScalarType::Float, {-1, inputs});
    units = weight.size(0);
    const Tensor &bias = take(ScalarType::Float, {units}), &sums = take(ScalarType::Float, {units}),
                 &samples = take(ScalarType::Long, {units});
    return runtime::Ridge{inputs, units, float_data(weight), float_data(bias), float_data(sums), integers(samples)};
  }

  static const int64_t* integers(const Tensor& t) { return static_cast<const int64_t*>(t.const_data_ptr()); }

  int64_t next(int64_t least, int64_t most) {
    require(at_ < layout_.size(), "layout: expected more than ", layout_.size(), " numbers, got the end of stage ",
            layout_.empty() ? 0 : layout_.back());
    const int64_t number = layout_[at_];
    require(number >= least && number <= most, "layout: expected ", least, " to ", most, " as number ", at_, ", got ",
            number);
    ++at_;
    return number;
  }

  // The next tensor, contiguous; -1 stands for any number of rows.
  const Tensor& take(ScalarType dtype, std::initializer_list<int64_t> shape) {
    require(tensor_ < tensors_.size(), "tensors: expected more than ", tensors_.size(), ", which the layout names");
    Tensor& t = tensors_[tensor_];
    const auto name = "tensors[" + std::to_string(tensor_) + "]";
    check_place(name.c_str(), t, place_);
    bool fits = t.scalar_type() == dtype && t.dim() == static_cast<int64_t>(shape.size());
    std::ostringstream wanted;
    int64_t i = 0;
    for (const int64_t size : shape) {
      fits = fits && (size == -1 || t.size(i) == size);
      ++i;
    }
    if (!fits)
      for (const int64_t size : shape) wanted << ' ' << size;
    require(fits, name, ": expected ", dtype_name(dtype), " of sizes", wanted.str(), " (-1: any), got ", describe(t));
    t = as_contiguous(t);
    ++tensor_;
    return t;
  }

  const std::vector<int64_t>& layout_;
  std::vector<Tensor>& tensors_;
  const Place place_;
  std::vector<float> factors_;
  size_t at_ = 0, tensor_ = 0;
  int64_t factor_ = 0;
  bool whole_ = true, values_ = true, bits_ = false, gate_ = false, scores_ = false;
};

Tensor packed_network(const Tensor& x, std::optional<Tensor> gate_bits, std::vector<int64_t> layout,
                      std::vector<double> factors, std::vector<Tensor> tensors) {
  const Place place = place_of("x", x);
  Reader reader(layout, factors, tensors, place);
  const std::vector<Stage> stages = reader.read();
  const int64_t inputs = reader.inputs;
  if (reader.real) {
    require(x.scalar_type() == ScalarType::Byte && x.dim() == 2 && x.size(1) == inputs,
            "x: expected uint8 of shape (M, ", inputs, "), got ", describe(x));
    require(!gate_bits, "gate_bits: expected None before a product of numbers, got ", describe(*gate_bits));
  } else {
    check_packed("x", x, inputs, place);
  }
  const int64_t M = x.size(0);
  const int64_t gate_stride = gate_bits ? check_gate("gate_bits", *gate_bits, M, inputs, place) : 0;
  const Tensor in = as_contiguous(x);
  const OptionalBits gates(gate_bits);
  const auto* numbers = static_cast<const uint8_t*>(in.const_data_ptr());
  const int64_t units = reader.units, words = words_for(units);
  Tensor out = reader.gives_gate ? new_tensor({M, words}, ScalarType::Long, place)
                                 : new_tensor({M, units}, ScalarType::Float, place);
  void* to = out.mutable_data_ptr();
  TorchRuntime rt;
  runtime::share_samples(rt.get(), M, reader.steps, reader.widest, [&](int64_t begin, int64_t count, const Call& call) {
    State state{count, {numbers + begin * inputs, Type::kUint8, inputs, 255}, nullptr, nullptr, 0};
    if (!reader.real) {
      state.bits = packed_data(in) + begin * words_for(inputs);
      state.gate = gates.data() == nullptr ? nullptr : gates.data() + begin * gate_stride;
      state.gate_stride = gate_stride;
    }
    for (const Stage& stage : stages) std::visit([&](const auto& s) { s.run(state, call); }, stage);
    if (reader.gives_gate) {
      for (int64_t i = 0; i < count; ++i)
        std::copy_n(state.gate + i * state.gate_stride, words, static_cast<uint64_t*>(to) + (begin + i) * words);
      return;
    }
    float* scores = static_cast<float*>(to) + begin * units;
    if (state.y.type == Type::kInt32)
      std::copy_n(static_cast<const int32_t*>(state.y.data), count * units, scores);
    else
      std::copy_n(static_cast<const float*>(state.y.data), count * units, scores);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(engram_kernels, CPU, m) { m.impl("packed_network", TORCH_BOX(&packed_network)); }

}  // namespace engram::bindings
