#include "runtime/file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "runtime/error.h"

namespace engram::runtime {
namespace {

constexpr size_t kMostHeader = size_t{100} << 20;  // as the safetensors library allows

// Bytes of an element of the dtypes that packed models have; 0 for any other.
size_t element_size(const std::string& dtype) {
  if (dtype == "U8") return 1;
  if (dtype == "I32" || dtype == "F32") return 4;
  return dtype == "I64" ? 8 : 0;
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string out = "(";
  for (size_t i = 0; i < shape.size(); ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + ")";
}

class Descriptor {
 public:
  explicit Descriptor(int number) : number_(number) {}
  ~Descriptor() {
    if (number_ >= 0) close(number_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int number() const { return number_; }

 private:
  int number_;
};

}  // namespace

File File::map(const char* path) {
  const Descriptor file(open(path, O_RDONLY | O_CLOEXEC));
  require(file.number() >= 0, "cannot open it: ", std::strerror(errno));
  struct stat status{};
  require(fstat(file.number(), &status) == 0, "cannot read it: ", std::strerror(errno));
  require(S_ISREG(status.st_mode), "expected a file, got something else");
  require(status.st_size > 0, "expected a safetensors file, got an empty one");
  const size_t bytes = static_cast<size_t>(status.st_size);
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE, file.number(), 0);
  require(data != MAP_FAILED, "cannot map it: ", std::strerror(errno));
  File out(static_cast<uint8_t*>(data), bytes, true);
  out.read_header();
  return out;
}

File File::copy(const void* data, size_t bytes) {
  require(data != nullptr || bytes == 0, "data: expected bytes, got a null pointer");
  auto* own = static_cast<uint8_t*>(std::malloc(bytes + 1));
  require(own != nullptr, "expected memory for ", bytes, " bytes, got none");
  if (bytes != 0) std::memcpy(own, data, bytes);
  File out(own, bytes, false);
  out.read_header();
  return out;
}

File::File(File&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      bytes_(other.bytes_),
      mapped_(other.mapped_),
      metadata_(std::move(other.metadata_)),
      tensors_(std::move(other.tensors_)) {}

File::~File() {
  if (data_ == nullptr) return;
  if (mapped_)
    munmap(data_, bytes_);
  else
    std::free(data_);
}

void File::read_header() {
  require(bytes_ >= 8, "expected a safetensors file, got ", bytes_, " bytes");
  uint64_t length;
  std::memcpy(&length, data_, sizeof(length));
  require(length <= kMostHeader, "expected a safetensors file, got a header of ", std::to_string(length), " bytes");
  require(length <= bytes_ - 8, "expected a whole file, got one that ends within its header");
  const size_t first = 8 + static_cast<size_t>(length), rest = bytes_ - first;
  const Json header = Json::parse({reinterpret_cast<const char*>(data_) + 8, static_cast<size_t>(length)});
  std::map<size_t, size_t> extents;  // begin and end
  for (const auto& [name, value] : header.object("header")) {
    if (name == "__metadata__") {
      for (const auto& [key, text] : value.object(name)) metadata_[key] = text.string(key);
      continue;
    }
    Entry entry;
    entry.dtype = value.at("dtype", name).string(name);
    const size_t size = element_size(entry.dtype);
    require(size != 0, name, ": expected U8, I32, I64 or F32, got ", entry.dtype);
    entry.bytes = size;
    for (const Json& dimension : value.at("shape", name).list(name)) {
      const int64_t extent = dimension.integer(name);
      require(extent >= 0 && !__builtin_mul_overflow(entry.bytes, static_cast<size_t>(extent), &entry.bytes), name,
              ": expected a shape, got ", extent);
      entry.shape.push_back(extent);
    }
    const std::vector<Json>& offsets = value.at("data_offsets", name).list(name);
    require(offsets.size() == 2, name, ": expected two offsets");
    const int64_t begin = offsets[0].integer(name), end = offsets[1].integer(name);
    require(0 <= begin && begin <= end && static_cast<size_t>(end - begin) == entry.bytes, name, ": expected ",
            entry.bytes, " bytes for its shape, got offsets ", begin, " to ", end);
    require(static_cast<uint64_t>(end) <= rest, name, ": expected a whole file, got one that lacks the end of it");
    entry.begin = first + static_cast<size_t>(begin);
    require(entry.begin % size == 0, name, ": expected elements that are aligned, got offset ", begin);
    if (entry.bytes != 0)
      require(extents.emplace(entry.begin, entry.begin + entry.bytes).second, name, ": expected bytes of its own");
    tensors_.emplace(name, std::move(entry));
  }
  size_t next = first;
  for (const auto& [begin, end] : extents) {
    require(begin == next, "expected tensors one behind the other, got a gap or an overlap at byte ", begin);
    next = end;
  }
  require(next == bytes_, "expected a file of ", next, " bytes, got ", bytes_);
}

const std::string& File::metadata(const std::string& key) const {
  const auto found = metadata_.find(key);
  require(found != metadata_.end(), "__metadata__: expected the key ", key, ", got none");
  return found->second;
}

void* File::find(const std::string& name, const char* dtype, std::initializer_list<int64_t> shape, size_t size) {
  const auto found = tensors_.find(name);
  require(found != tensors_.end(), name, ": expected a tensor, got none");
  Entry& entry = found->second;
  require(entry.dtype == dtype && entry.shape == std::vector<int64_t>(shape) && element_size(dtype) == size, name,
          ": expected ", dtype, " ", shape_text(shape), ", got ", entry.dtype, " ", shape_text(entry.shape));
  entry.used = true;
  return data_ + entry.begin;
}

void File::check_all_used() const {
  for (const auto& [name, entry] : tensors_) require(entry.used, name, ": expected no such tensor");
}

void File::save(const char* path) const {
  const std::string temporary = std::string(path) + "." + std::to_string(getpid()) + ".part";
  const Descriptor file(open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666));
  require(file.number() >= 0, temporary, ": cannot write there: ", std::strerror(errno));
  const auto fail = [&] {
    const std::string reason = std::strerror(errno);
    unlink(temporary.c_str());
    throw Error(std::string(path) + ": cannot write it: " + reason);
  };
  for (size_t done = 0; done < bytes_;) {
    const ssize_t written = write(file.number(), data_ + done, bytes_ - done);
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) fail();
    done += static_cast<size_t>(written);
  }
  if (fsync(file.number()) != 0 || std::rename(temporary.c_str(), path) != 0) fail();
}

}  // namespace engram::runtime
