// How the operators share their work out among threads, and where they find their kernels and their memory.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "core/bits.h"
#include "cpu/float_mode.h"
#include "cpu/launch.h"

namespace engram::cpu {

// The kernels of the instruction set in use.
std::atomic<const Kernels*>& active();

// Elementary steps below which a second thread costs more than it brings (about 10 microseconds of work).
constexpr int64_t kGrainWork = 1 << 15;

// Calls f on ranges that cover [0, count).
template <typename F>
void share(const Runtime& rt, int64_t count, int64_t work_per_item, const F& f) {
  if (count <= 0) return;
  const int64_t grain = work_per_item >= kGrainWork ? 1 : ceil_div(kGrainWork, work_per_item < 1 ? 1 : work_per_item);
  rt.parallel_for(
      count, grain,
      [](int64_t begin, int64_t end, void* context) {
        const DefaultFloatMode mode;
        (*static_cast<const F*>(context))(Range{begin, end});
      },
      const_cast<F*>(&f));
}

template <typename T>
T* workspace(const Runtime& rt, int64_t elements) {
  return static_cast<T*>(rt.allocate(rt.owner, static_cast<size_t>(elements) * sizeof(T)));
}

inline const uint64_t* transposed(const Runtime& rt, const uint64_t* bits, int64_t rows, int64_t k) {
  const TransposeBits p{bits, rows, k, workspace<uint64_t>(rt, k * words_for(rows))};
  transpose_bits(rt, p);
  return p.out;
}

// Items of blocks of `size`, of which there are `count` in all.
inline Range items_of(Range blocks, int64_t size, int64_t count) {
  const int64_t end = blocks.end * size;
  return {blocks.begin * size, end < count ? end : count};
}

// Blocks among the threads, each of which has scratch of its own: f(block, scratch).
template <typename F>
void share_blocks(const Runtime& rt, int64_t blocks, int64_t work, int64_t scratch_bytes, const F& f) {
  const int64_t shares = rt.threads < blocks ? rt.threads : blocks;
  if (shares == 0) return;
  const int64_t bytes = ceil_div(scratch_bytes, 64) * 64 + 64;  // shares write to no common line of the cache
  char* scratch = workspace<char>(rt, shares * bytes);
  share(rt, shares, work * blocks / shares, [&](Range part) {
    for (int64_t i = part.begin; i < part.end; ++i)
      for (int64_t block = blocks * i / shares; block < blocks * (i + 1) / shares; ++block)
        f(block, scratch + i * bytes);
  });
}

inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr int64_t kWordBytes = sizeof(uint64_t), kFloatBytes = sizeof(float), kCountBytes = sizeof(int32_t);

}  // namespace engram::cpu
