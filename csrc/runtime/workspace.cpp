#include "runtime/workspace.h"

#include <algorithm>

namespace engram::runtime {
namespace {

constexpr size_t kAlignment = 64;  // a cache line
constexpr size_t kLeastChunk = size_t{1} << 20;

}  // namespace

void* Workspace::allocate(size_t bytes) {
  bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  if (chunks_.empty() || chunks_.back().bytes - chunks_.back().used < bytes) {
    const size_t size = std::max(kLeastChunk, bytes + kAlignment);
    std::unique_ptr<std::byte[]> data(new std::byte[size]);
    const size_t shift = (kAlignment - reinterpret_cast<uintptr_t>(data.get()) % kAlignment) % kAlignment;
    chunks_.push_back({std::move(data), size, shift});
  }
  Chunk& chunk = chunks_.back();
  void* out = chunk.data.get() + chunk.used;
  chunk.used += bytes;
  return out;
}

// One chunk that would have held everything takes the place of several.
void Workspace::clear() {
  if (chunks_.size() > 1) {
    size_t total = 0;
    for (const Chunk& chunk : chunks_) total += chunk.bytes;
    chunks_.clear();
    allocate(total);
  }
  for (Chunk& chunk : chunks_)
    chunk.used = (kAlignment - reinterpret_cast<uintptr_t>(chunk.data.get()) % kAlignment) % kAlignment;
}

}  // namespace engram::runtime
