// patch_excitability: the largest response of each unit's filter near the unit's place, by contrast.
//
//   z[m,n] = max over the pool x pool places r, c from the unit's on of
//            sum_ij w[f,i,j] x[m,r+i,c+j,channel] / (sqrt(sum of (x - mean)^2 over the patch) + floor)
//
//   images   [M, height, width, channels] uint8
//   filters  [F, size, size] of -1, 0, 1, as look_ups (see kernels.h)
//   units    numbers of place, channel and filter, rising
//   z        [M, N] float32
//
// A lane is a sample: 32 of them stand side by side, in 16 bits. Places are visited column by column, downwards. The
// 16 sums of four pixels of a row with any signs are tabulated when the row is reached, and serve all filters and the
// `size` places above; the tables of a patch stay in the first-level cache. A filter then costs one look-up and one
// addition for four taps of 32 samples, at the places alone where a unit needs it. Sums of taps, and the sums of
// pixels and of their squares that the contrast takes, are integers and exact; the last steps are single operations on
// float32, in the order of reference.py: every instruction set gives the same bits. Bound by the look-ups' loads.
#include <cstring>

#include "cpu/simd.h"
#include "cpu/tables.h"

namespace engram::cpu::ENGRAM_ISA {

namespace {

constexpr int kLaneSamples = static_cast<int>(kPatchSamples);
constexpr int kNarrowLanes = kVectorBytes / 2;
constexpr int kVectors = kLaneSamples / kNarrowLanes;
constexpr int kEntryBytes = 2 * kLaneSamples;
constexpr int64_t kMostNarrowTaps = 128, kMostNarrowSize = 11;  // of 255 each, in 16 bits

// Sums wrap around on their way, and fit in the end.
using Narrow [[gnu::vector_size(kVectorBytes)]] = uint16_t;

ENGRAM_INLINE Narrow load_narrow(const void* p) {
  Narrow v;
  memcpy(&v, p, sizeof v);
  return v;
}
ENGRAM_INLINE void store_narrow(void* p, Narrow v) { memcpy(p, &v, sizeof v); }

// Half a Narrow, and its numbers as floats.
constexpr int kWideLanes = kNarrowLanes / 2;
using Half [[gnu::vector_size(kVectorBytes / 2)]] = int16_t;
using Wide [[gnu::vector_size(kVectorBytes)]] = float;
ENGRAM_INLINE Half half_of(Narrow v, int half) {
  Half out;
  memcpy(&out, reinterpret_cast<const char*>(&v) + half * sizeof out, sizeof out);
  return out;
}
ENGRAM_INLINE Wide load_wide(const float* p) {
  Wide v;
  memcpy(&v, p, sizeof v);
  return v;
}

// Numbers of 32 samples.
struct Shorts32 {
  alignas(64) int16_t of[kLaneSamples];
};
struct Ints32 {
  alignas(64) int32_t of[kLaneSamples];
};
struct Floats32 {
  alignas(64) float of[kLaneSamples];
};

// What one share works in; `next` hands out its scratch from the front.
class Scratch {
 public:
  Scratch(const PreparedPatches& p)
      : next_(p.scratch),
        pixels(next<Shorts32>(p.height * p.width * p.channels)),
        tables(next<Shorts32>(p.size * p.windows * kPatchEntries)),
        row_sums(next<Ints32>(p.height)),
        row_squares(next<Ints32>(p.height)),
        z(next<Floats32>(p.N)) {}

 private:
  template <typename T>
  T* next(int64_t count) {
    char* at = next_;
    next_ += count * static_cast<int64_t>(sizeof(T));
    return reinterpret_cast<T*>(at);
  }
  char* next_;

 public:
  Shorts32* const pixels;  // [height, width, channels]
  Shorts32* const tables;  // [size, windows, kPatchEntries], rows of the image in turns
  Ints32* const row_sums;  // [height] of the patch's pixels in each row of the image
  Ints32* const row_squares;
  Floats32* const z;  // [N]
};

void load_pixels(const PreparedPatches& p, int64_t first, Shorts32* pixels) {
  const int64_t features = p.height * p.width * p.channels, samples = smaller(kPatchSamples, p.M - first);
  if (samples < kPatchSamples) memset(pixels, 0, static_cast<size_t>(features) * sizeof *pixels);
  for (int64_t j = 0; j < samples; ++j) {
    const uint8_t* image = p.images + (first + j) * features;
    for (int64_t k = 0; k < features; ++k) pixels[k].of[j] = image[k];
  }
}

// The sums of up to four pixels, `step` apart, with every sign.
void tabulate(const Shorts32* pixels, int64_t step, int64_t taps, Shorts32* table) {
  const int entries = 1 << taps;
  for (int v = 0; v < kVectors; ++v) {
    const auto at = [v](const Shorts32& numbers) { return reinterpret_cast<const char*>(&numbers) + v * kVectorBytes; };
    Narrow term[kPatchTaps], low[4], high[4];
    for (int64_t i = 0; i < kPatchTaps; ++i) term[i] = i < taps ? load_narrow(at(pixels[i * step])) : Narrow{};
    for (int b = 0; b < 4; ++b) {
      low[b] = (b & 1 ? term[0] : -term[0]) + (b & 2 ? term[1] : -term[1]);
      high[b] = (b & 1 ? term[2] : -term[2]) + (b & 2 ? term[3] : -term[3]);
    }
    for (int b = 0; b < entries; ++b)
      store_narrow(reinterpret_cast<char*>(&table[b]) + v * kVectorBytes, low[b & 3] + high[b >> 2]);
  }
}

// All places of the images of a tile.
class Places {
 public:
  Places(const PreparedPatches& p, const Scratch& s)
      : p_(p),
        s_(s),
        rows_(p.height - p.size + 1),
        columns_(p.width - p.size + 1),
        needed_(p.needed),
        visits_(p.visits),
        units_(p.visited_units),
        one_over_taps_(static_cast<float>(1.0 / static_cast<double>(p.size * p.size))) {}

  void visit_all() {
    for (channel_ = 0; channel_ < p_.channels; ++channel_) visit_channel();
  }

 private:
  void visit_channel() {
    for (int64_t c = 0; c < columns_; ++c) {
      sum_rows(c);
      sums_ = squares_ = Ints32{};
      for (int64_t row = 0; row < p_.size - 1; ++row) enter(row, c);
      for (int64_t r = 0; r < rows_; ++r) {
        enter(r + p_.size - 1, c);
        visit(r, c);
        for (int j = 0; j < kLaneSamples; ++j) sums_.of[j] -= s_.row_sums[r].of[j];
        for (int j = 0; j < kLaneSamples; ++j) squares_.of[j] -= s_.row_squares[r].of[j];
      }
    }
  }

  const Shorts32& pixel(int64_t row, int64_t column) const {
    return s_.pixels[(row * p_.width + column) * p_.channels + channel_];
  }

  // In 16 bits, which hold it, for the sake of vectors.
  static uint16_t square_of(int16_t x) {
    return static_cast<uint16_t>(static_cast<uint16_t>(x) * static_cast<uint16_t>(x));
  }

  // The sums of each row of the image that a patch in column c has: those of the column before, moved on by one.
  void sum_rows(int64_t c) {
    for (int64_t row = 0; row < p_.height; ++row) {
      Ints32 &sum = s_.row_sums[row], &square = s_.row_squares[row];
      const auto add = [&](const Shorts32& x) {
        for (int j = 0; j < kLaneSamples; ++j) {
          sum.of[j] += x.of[j], square.of[j] += square_of(x.of[j]);
        }
      };
      if (c == 0) {
        sum = square = Ints32{};
        for (int64_t i = 0; i < p_.size - 1; ++i) add(pixel(row, i));
      } else {
        const Shorts32& x = pixel(row, c - 1);
        for (int j = 0; j < kLaneSamples; ++j) {
          sum.of[j] -= x.of[j], square.of[j] -= square_of(x.of[j]);
        }
      }
      add(pixel(row, c + p_.size - 1));
    }
  }

  Shorts32* tables_of(int64_t row) const { return s_.tables + row % p_.size * p_.windows * kPatchEntries; }

  // A row of the image becomes part of the patches in column c.
  void enter(int64_t row, int64_t c) {
    for (int64_t w = 0; w < p_.windows; ++w) {
      const int64_t first = w * kPatchTaps;
      tabulate(&pixel(row, c + first), p_.channels, smaller<int64_t>(kPatchTaps, p_.size - first),
               tables_of(row) + w * kPatchEntries);
    }
    for (int j = 0; j < kLaneSamples; ++j) sums_.of[j] += s_.row_sums[row].of[j];
    for (int j = 0; j < kLaneSamples; ++j) squares_.of[j] += s_.row_squares[row].of[j];
  }

  void visit(int64_t r, int64_t c) {
    const int32_t needed = *needed_++;
    if (needed == 0) return;
    find_contrast();
    for (int64_t i = 0; i < smaller(p_.size, kMostNarrowSize); ++i) row_tables_[i] = tables_of(r + i);
    const PatchFilter* end = visits_ + needed;
    switch (p_.size) {  // the usual sizes, unrolled
      case 4:
        return visit_filters(end, [&](int64_t f, Floats32& out) { respond_narrow<4>(f, r, c, out); });
      case 6:
        return visit_filters(end, [&](int64_t f, Floats32& out) { respond_narrow<6>(f, r, c, out); });
      case 8:
        return visit_filters(end, [&](int64_t f, Floats32& out) { respond_narrow<8>(f, r, c, out); });
      default:
        if (p_.size <= kMostNarrowSize)
          return visit_filters(end, [&](int64_t f, Floats32& out) { respond_narrow<0>(f, r, c, out); });
        return visit_filters(end, [&](int64_t f, Floats32& out) { respond(f, r, c, out); });
    }
  }

  template <typename Respond>
  void visit_filters(const PatchFilter* end, const Respond& response_of) {
    for (; visits_ < end; ++visits_) {
      Floats32 response;
      response_of(visits_->filter, response);
      for (const int32_t* last = units_ + visits_->units; units_ < last; ++units_) {
        float* z = s_.z[*units_].of;
        for (int j = 0; j < kLaneSamples; ++j) z[j] = response.of[j] > z[j] ? response.of[j] : z[j];
      }
    }
  }

  void find_contrast() {
    for (int j = 0; j < kLaneSamples; ++j) {
      const auto sum = static_cast<float>(sums_.of[j]);
      const float spread = static_cast<float>(squares_.of[j]) - sum * sum * one_over_taps_;
      one_over_contrast_.of[j] = 1.0f / (__builtin_sqrtf(spread > 0.0f ? spread : 0.0f) + p_.floor);
    }
  }

  // The response of a filter whose sums 16 bits hold. Zeros are looked up as +1.
  template <int64_t Size>
  void respond_narrow(int64_t f, int64_t r, int64_t c, Floats32& out) const {
    const int64_t size = Size > 0 ? Size : p_.size, windows = Size > 0 ? ceil_div(Size, kPatchTaps) : p_.windows;
    const uint16_t* look_ups = p_.look_ups + f * size * windows;
    Narrow sum[kVectors] = {};
#pragma GCC unroll 8
    for (int64_t i = 0; i < size; ++i) {
      for (int64_t w = 0; w < windows; ++w) add_entry(row_tables_[i], look_ups[i * windows + w], sum);
    }
    for (int32_t i = p_.zero_begin[f]; i < p_.zero_begin[f + 1]; ++i) {
      const Shorts32& x = pixel(r + p_.zero_taps[i] / size, c + p_.zero_taps[i] % size);
      for (int v = 0; v < kVectors; ++v) sum[v] -= load_narrow(reinterpret_cast<const char*>(&x) + v * kVectorBytes);
    }
    for (int v = 0; v < kVectors; ++v) {
      for (int half = 0; half < 2; ++half) {
        const int first = (2 * v + half) * kWideLanes;
        const Wide response =
            __builtin_convertvector(half_of(sum[v], half), Wide) * load_wide(one_over_contrast_.of + first);
        memcpy(out.of + first, &response, sizeof response);
      }
    }
  }

  // The same of any filter, some rows at a time in 16 bits.
  void respond(int64_t f, int64_t r, int64_t c, Floats32& out) const {
    const uint16_t* look_ups = p_.look_ups + f * p_.size * p_.windows;
    int32_t total[kLaneSamples] = {};
    const int64_t step = kMostNarrowTaps / p_.size;
    for (int64_t first = 0; first < p_.size; first += step) {
      Narrow sum[kVectors] = {};
      for (int64_t i = first; i < smaller(first + step, p_.size); ++i)
        for (int64_t w = 0; w < p_.windows; ++w) add_entry(tables_of(r + i), look_ups[i * p_.windows + w], sum);
      Shorts32 of_rows;
      memcpy(&of_rows, sum, sizeof of_rows);
      for (int j = 0; j < kLaneSamples; ++j) total[j] += of_rows.of[j];
    }
    for (int32_t i = p_.zero_begin[f]; i < p_.zero_begin[f + 1]; ++i) {
      const Shorts32& x = pixel(r + p_.zero_taps[i] / p_.size, c + p_.zero_taps[i] % p_.size);
      for (int j = 0; j < kLaneSamples; ++j) total[j] -= x.of[j];
    }
    for (int j = 0; j < kLaneSamples; ++j) out.of[j] = static_cast<float>(total[j]) * one_over_contrast_.of[j];
  }

  static void add_entry(const Shorts32* tables, uint16_t look_up, Narrow* sum) {
    const char* entry = reinterpret_cast<const char*>(tables) + look_up;
    for (int v = 0; v < kVectors; ++v) sum[v] += load_narrow(entry + v * kVectorBytes);
  }

  const PreparedPatches& p_;
  const Scratch& s_;
  const int64_t rows_, columns_;
  int64_t channel_ = 0;
  const int32_t* needed_;
  const PatchFilter* visits_;
  const int32_t* units_;
  const float one_over_taps_;
  Ints32 sums_, squares_;  // of a patch
  Floats32 one_over_contrast_;
  const Shorts32* row_tables_[kMostNarrowSize];
};

}  // namespace

void patch_excitability(const PreparedPatches& p, Range tiles) {
  const Scratch scratch(p);
  for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
    const int64_t first = tile * kPatchSamples, samples = smaller(kPatchSamples, p.M - first);
    load_pixels(p, first, scratch.pixels);
    for (int64_t n = 0; n < p.N; ++n)
      for (float& z : scratch.z[n].of) z = -__builtin_inff();
    Places(p, scratch).visit_all();
    write_transposed(&scratch.z[0].of[0], kPatchSamples, p.N, samples, p.z + first * p.N, p.N);
  }
}

}  // namespace engram::cpu::ENGRAM_ISA
