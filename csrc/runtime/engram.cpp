// The C interface: what it is given is checked here, and no exception passes it.
#include "runtime/engram.h"

#include <algorithm>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "runtime/error.h"
#include "runtime/file.h"
#include "runtime/network.h"
#include "runtime/threads.h"

namespace {

using namespace engram::runtime;  // NOLINT: this file is its interface

constexpr int64_t kVersion = 2;
constexpr int kMostThreads = 1024;

thread_local std::string last_error;
thread_local Workspace workspace;

}  // namespace

struct engram_model {
  File file;
  std::vector<std::string> labels;
  Network network;
  mutable Pool pool;

  engram_model(File source, const Json& described, int threads)
      : file(std::move(source)),
        labels(),
        network(described.at("features", "network").integer("features"), described.at("layers", "network"), file),
        pool(threads) {
    file.check_all_used();
    const Json* given = described.find("labels", "network");
    const bool named = given != nullptr && !given->is_null();
    for (int64_t i = 0; !named && i < network.classes(); ++i) labels.push_back(std::to_string(i));
    if (!named) return;
    for (const Json& label : given->list("labels"))
      labels.push_back(label.is_integer() ? std::to_string(label.integer("labels")) : label.string("labels"));
    require(static_cast<int64_t>(labels.size()) == network.classes(), "labels: expected ", network.classes(),
            ", one for each class, got ", labels.size());
  }
};

namespace {

engram_model* make_model(File file, int threads) {
  const std::string& format = file.metadata("format");
  require(format == "engram_kernels.packed", "expected a packed model of engram_kernels, got a file of format ",
          format);
  const int64_t version = Json::parse(file.metadata("version")).integer("version");
  require(version >= 1 && version <= kVersion, "expected a packed model of version 1 to ", kVersion,
          ", got one of version ", version);
  require(threads >= 1 && threads <= kMostThreads, "threads: expected 1 to ", kMostThreads, ", got ", threads);
  const Json described = Json::parse(file.metadata("network"));
  const int64_t features = described.at("features", "network").integer("features");
  require(features >= 1 && features <= INT32_MAX, "features: expected 1 to 2^31 - 1, got ", features);
  return new engram_model(std::move(file), described, threads);
}

// Runs `body`; false with the reason kept, if it raised an exception.
template <typename Body>
bool guarded(const std::string& prefix, Body body) {
  try {
    body();
    return true;
  } catch (const std::bad_alloc&) {
    last_error = prefix + "expected enough memory, got none";
  } catch (const std::exception& error) {
    last_error = prefix + error.what();
  }
  return false;
}

Type check_input(const engram_model* model, const void* x, engram_type type, int64_t samples) {
  require(model != nullptr, "model: expected one, got a null pointer");
  require(type == ENGRAM_FLOAT32 || type == ENGRAM_UINT8, "type: expected ENGRAM_FLOAT32 or ENGRAM_UINT8, got ",
          static_cast<int>(type));
  require(samples >= 0, "samples: expected at least 0, got ", samples);
  require(x != nullptr || samples == 0, "x: expected numbers, got a null pointer");
  return type == ENGRAM_UINT8 ? Type::kUint8 : Type::kFloat32;
}

}  // namespace

extern "C" {

engram_model* engram_load(const char* path, int threads) {
  engram_model* model = nullptr;
  guarded(std::string(path == nullptr ? "path" : path) + ": ", [&] {
    require(path != nullptr, "expected one, got a null pointer");
    model = make_model(File::map(path), threads);
  });
  return model;
}

engram_model* engram_load_memory(const void* data, size_t bytes, int threads) {
  engram_model* model = nullptr;
  guarded("data: ", [&] { model = make_model(File::copy(data, bytes), threads); });
  return model;
}

void engram_free(engram_model* model) { delete model; }

void engram_sizes(const engram_model* model, int64_t* features, int64_t* classes) {
  *features = model->network.features();
  *classes = model->network.classes();
}

const char* engram_label(const engram_model* model, int64_t class_number) {
  const bool known = class_number >= 0 && class_number < model->network.classes();
  return known ? model->labels[static_cast<size_t>(class_number)].c_str() : nullptr;
}

bool engram_predict(const engram_model* model, const void* x, engram_type type, int64_t samples, int64_t* class_numbers,
                    float* scores) {
  return guarded("", [&] {
    const Type input = check_input(model, x, type, samples);
    const int64_t classes = model->network.classes();
    std::vector<float> own;
    if (scores == nullptr) own.resize(static_cast<size_t>(samples * classes)), scores = own.data();
    model->network.predict(x, input, samples, scores, runtime_of(model->pool, workspace));
    for (int64_t i = 0; class_numbers != nullptr && i < samples; ++i) {
      const float* row = scores + i * classes;
      class_numbers[i] = std::max_element(row, row + classes) - row;
    }
  });
}

bool engram_learn(engram_model* model, const void* x, engram_type type, int64_t samples, const int64_t* class_numbers) {
  return guarded("", [&] {
    const Type input = check_input(model, x, type, samples);
    require(class_numbers != nullptr || samples == 0, "class_numbers: expected numbers, got a null pointer");
    model->network.learn(x, input, samples, class_numbers, {runtime_of(model->pool, workspace), workspace, nullptr});
  });
}

bool engram_save(const engram_model* model, const char* path) {
  return guarded("", [&] {
    require(model != nullptr && path != nullptr, "model, path: expected both, got a null pointer");
    model->file.save(path);
  });
}

const char* engram_error(void) { return last_error.c_str(); }

}  // extern "C"
