// Fuzzes the loader: any bytes either are a model, which then predicts and learns, or are refused with a reason.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "runtime/engram.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t bytes) {
  engram_model* model = engram_load_memory(data, bytes, 1);
  if (model == nullptr) {
    if (engram_error()[0] == '\0') std::abort();
    return 0;
  }
  int64_t features, classes;
  engram_sizes(model, &features, &classes);
  constexpr int64_t kSamples = 3, kMost = 1 << 16;
  if (features <= kMost && classes <= kMost) {
    const std::vector<uint8_t> bytes_in(static_cast<size_t>(kSamples * features), 7);
    const std::vector<float> floats_in(static_cast<size_t>(kSamples * features), -0.5f);
    const std::vector<int64_t> labels(kSamples, 0);
    std::vector<float> scores(static_cast<size_t>(kSamples * classes));
    engram_predict(model, bytes_in.data(), ENGRAM_UINT8, kSamples, nullptr, scores.data());
    engram_learn(model, floats_in.data(), ENGRAM_FLOAT32, kSamples, labels.data());
    engram_predict(model, floats_in.data(), ENGRAM_FLOAT32, kSamples, nullptr, scores.data());
  }
  engram_free(model);
  return 0;
}

#if !defined(__clang__)
int main(int count, char** arguments) {
  for (int i = 1; i < count; ++i) {
    std::FILE* file = std::fopen(arguments[i], "rb");
    if (file == nullptr) return 1;
    std::vector<uint8_t> bytes;
    for (int c = std::fgetc(file); c != EOF; c = std::fgetc(file)) bytes.push_back(static_cast<uint8_t>(c));
    std::fclose(file);
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  }
  return 0;
}
#endif
