// A safetensors file in memory that can be written to without a change of the file itself.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <map>
#include <string>
#include <vector>

#include "runtime/json.h"

namespace engram::runtime {

class File {
 public:
  static File map(const char* path);
  static File copy(const void* data, size_t bytes);
  File(File&& other) noexcept;
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  ~File();

  // A text of the metadata; an Error if there is none.
  const std::string& metadata(const std::string& key) const;

  // Elements of a tensor, which must have just this dtype (as safetensors names it) and shape.
  template <typename T>
  T* tensor(const std::string& name, const char* dtype, std::initializer_list<int64_t> shape) {
    return static_cast<T*>(find(name, dtype, shape, sizeof(T)));
  }
  bool has(const std::string& name) const { return tensors_.count(name) != 0; }
  // The first size of a tensor, 0 if there is none.
  int64_t rows_of(const std::string& name) const {
    const auto found = tensors_.find(name);
    return found != tensors_.end() && !found->second.shape.empty() ? found->second.shape[0] : 0;
  }
  bool has_dtype(const std::string& name, const char* dtype) const {
    const auto found = tensors_.find(name);
    return found != tensors_.end() && found->second.dtype == dtype;
  }
  // Raises an Error if there is a tensor that was never asked for.
  void check_all_used() const;

  // Writes all bytes, with what has been changed in memory, to a file that appears as a whole or not at all.
  void save(const char* path) const;

 private:
  struct Entry {
    std::string dtype;
    std::vector<int64_t> shape;
    size_t begin, bytes;  // within the file
    bool used = false;
  };

  File(uint8_t* data, size_t bytes, bool mapped) : data_(data), bytes_(bytes), mapped_(mapped) {}
  void read_header();
  void* find(const std::string& name, const char* dtype, std::initializer_list<int64_t> shape, size_t size);

  uint8_t* data_;
  size_t bytes_;
  bool mapped_;
  std::map<std::string, std::string> metadata_;
  std::map<std::string, Entry> tensors_;
};

}  // namespace engram::runtime
