// Memory of one call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace engram::runtime {

// Given back all at once and kept for the next call.
class Workspace {
 public:
  template <typename T>
  T* get(int64_t elements) {
    return static_cast<T*>(allocate(static_cast<size_t>(elements) * sizeof(T)));
  }
  void* allocate(size_t bytes);
  void clear();

 private:
  struct Chunk {
    std::unique_ptr<std::byte[]> data;
    size_t bytes, used;
  };
  std::vector<Chunk> chunks_;
};

}  // namespace engram::runtime
