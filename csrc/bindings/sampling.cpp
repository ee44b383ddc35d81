// Recruiting the units of engrams.
#include <torch/csrc/stable/library.h>

#include <cmath>

#include "bindings/cuda_call.h"
#include "bindings/tensors.h"

namespace engram::bindings {

namespace {

Tensor sample_engram(const Tensor& score, const Tensor& seed, double rate, bool bernoulli, double temperature,
                     int64_t first_row, int64_t row_step) {
  const Place place = place_of("score", score);
  check_matrix("score", score, place);
  check_units("score", score);
  const int64_t M = score.size(0), K = score.size(1);
  const Seed key = check_seed(seed);
  require(rate > 0 && rate <= 1, "rate: expected in (0, 1], got ", rate);
  require(temperature == 0 || temperature >= 1e-6, "temperature: expected 0 or at least 1e-6, got ", temperature);
  require(first_row >= 0, "first_row: expected at least 0, got ", first_row);
  require(row_step >= 1, "row_step: expected at least 1, got ", row_step);
  const Tensor in = as_float32(score);
  Tensor gate = new_tensor({M, words_for(K)}, ScalarType::Long, place);
  const auto count = static_cast<int64_t>(std::nearbyint(rate * static_cast<double>(K)));
  SampleEngram p{};
  p.score = float_data(in), p.gate = data<uint64_t>(gate);
  p.M = M, p.K = K, p.words = words_for(K);
  p.bernoulli = bernoulli;
  p.count = count < 1 ? 1 : count;
  p.threshold = static_cast<uint64_t>(std::nearbyint(rate * 4294967296.0));
  p.inverse_temperature = temperature == 0 ? -1.0f : 1.0f / static_cast<float>(temperature);
  p.seed = key.key, p.offset = key.offset, p.first_row = static_cast<uint64_t>(first_row);
  p.row_step = static_cast<uint64_t>(row_step);
  if (!place.cuda) {
    TorchRuntime rt;
    require(!cpu::sample_engram(rt.get(), p), "score: expected numbers, got NaN");
    return gate;
  }
  CudaCall call(place);
  if (bernoulli || temperature > 0)
    call.refuse_capture(
        "seed: expected no capture into a CUDA graph, which would replay one engram for ever, since the seed is read "
        "when the call is made; an engram without noise (temperature 0) can be captured");
  p.key_stride = ceil_div(K, 4) * 4;
  std::optional<Tensor> keys;
  if (!bernoulli) keys = new_tensor({M, p.key_stride}, ScalarType::Int, place);
  p.keys = keys ? data<uint32_t>(*keys) : nullptr;
  p.nan = call.nan_flag(cuda::kSampleEngram);
  call.launch(cuda::launch_sample_engram, p);
  return gate;
}

template <typename Library>
void implement(Library& m) {
  m.impl("sample_engram", TORCH_BOX(&sample_engram));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(engram_kernels, CPU, m) { implement(m); }
STABLE_TORCH_LIBRARY_IMPL(engram_kernels, CUDA, m) { implement(m); }

}  // namespace engram::bindings
