// The two products of the backward pass, at a cost proportional to the recruited units.
//
//   gated_input_grad   dx[m,k]  = mask[m,k] sum_n d[m,n] s(W[n,k])      mask = gate & window, d [M, N], dx [M, K]
//   gated_weight_grad  dW[n,k]  = sum_m d[m,n] g[m,k] s(x[m,k])         dW [N, K]
//
// gated_input_grad reads W by columns (its sign bits transposed, [K, words_for(N)]): each recruited unit of a sample is
// a dot product of d[m] with one row of bits, kUnits of them in registers at once. Bound by masked additions.
// gated_weight_grad visits, per unit, only the samples that recruited it (listed once per call): plain vector additions
// of rows of d into a tile of kTileUnits x kTileOutputs, transposed on its way out. Bound by additions, or at low rates
// by writing dW once.
// Where most units are recruited, launch.cpp takes sign_product instead.
#include <cstring>

#include "cpu/simd.h"
#include "cpu/tables.h"

namespace engram::cpu::ENGRAM_ISA {

namespace {

constexpr int kUnits = 8;

constexpr int kGroup = 32;  // outputs whose bits are read together
constexpr int kGroupVectors = kGroup / kLanes;

ENGRAM_INLINE Bits32 bits32_at(const uint64_t* row, int64_t n) {
  uint32_t bits;
  memcpy(&bits, reinterpret_cast<const char*>(row) + n / 8, sizeof bits);
  return bits32(bits);
}

ENGRAM_INLINE void add_group(const float* d, const uint64_t* const* w, int64_t n, Floats* acc) {
  Floats value[kGroupVectors];
  for (int v = 0; v < kGroupVectors; ++v) value[v] = load(d + v * kLanes);
#pragma GCC unroll 8
  for (int u = 0; u < kUnits; ++u) {
    const Bits32 bits = bits32_at(w[u], n);
#pragma GCC unroll 8
    for (int v = 0; v < kGroupVectors; ++v) acc[u] = add_where(acc[u], mask_of(bits, v), value[v]);
  }
}

// dx at `units` of sample m; entries past `n_units` repeat a unit and are not written.
ENGRAM_INLINE void dots_at(const GatedInputGrad& p, int64_t m, const int64_t* units, int n_units) {
  const int64_t words = words_for(p.N);
  const float* d = p.d + m * p.N;
  const uint64_t* w[kUnits];
  for (int u = 0; u < kUnits; ++u) w[u] = p.w_t + units[u < n_units ? u : 0] * words;
  Floats acc[kUnits];
  for (int u = 0; u < kUnits; ++u) acc[u] = zero();
  int64_t n = 0;
  for (; n + kGroup <= p.N; n += kGroup) add_group(d + n, w, n, acc);
  if (n < p.N) {
    float tail[kGroup] = {};
    for (int64_t i = n; i < p.N; ++i) tail[i - n] = d[i];
    add_group(tail, w, n, acc);
  }
  for (int u = 0; u < n_units; ++u) p.dx[m * p.K + units[u]] = 2.0f * total(acc[u]) - p.d_sum[m];
}

constexpr int kTileUnits = 64;
constexpr int kTileOutputs = 64;
constexpr int kVectors = kTileOutputs / kLanes;

// One row of the tile, or what is added to it: the sum over a unit's samples of +-d[m, n .. n + kTileOutputs). One loop
// over both signs: its end is the only branch that a unit mispredicts.
ENGRAM_INLINE void add_samples(const float* d, const uint8_t* list, int32_t count, bool go_on, float* out) {
  static constexpr float kSign[2] = {1.0f, -1.0f};
  Floats acc[kVectors];
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) acc[v] = go_on ? load(out + v * kLanes) : zero();
  for (int32_t i = 0; i < count; ++i) {
    const float* row = d + (list[i] >> 1) * kTileOutputs;
    const Floats sign = all(kSign[list[i] & 1]);
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) acc[v] = add_product(acc[v], sign, load(row + v * kLanes));
  }
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) store(out + v * kLanes, acc[v]);
}

}  // namespace

void gated_input_grad(const GatedInputGrad& p, int64_t m_begin, int64_t m_end) {
  for (int64_t m = m_begin; m < m_end; ++m) {
    float* dx = p.dx + m * p.K;
    for (int64_t k = 0; k < p.K; ++k) dx[k] = 0.0f;
    const uint64_t* mask = p.mask + m * p.mask_stride;
    int64_t units[kUnits];
    int n_units = 0;
    for (int64_t word = 0; word * kWordBits < p.K; ++word) {
      for (uint64_t left = mask[word] & valid_bits(word, p.K); left != 0; left &= left - 1) {
        units[n_units++] = word * kWordBits + __builtin_ctzll(left);
        if (n_units == kUnits) {
          dots_at(p, m, units, kUnits);
          n_units = 0;
        }
      }
    }
    if (n_units > 0) dots_at(p, m, units, n_units);
  }
}

void list_samples(const GatedWeightGrad& p, int64_t word_begin, int64_t word_end) {
  for (int64_t first = 0; first < p.M; first += kSampleChunk) {
    uint8_t* lists = p.lists + first / kSampleChunk * p.K * p.capacity;
    int32_t* counts = p.counts + first / kSampleChunk * p.K;
    for (int64_t word = word_begin; word < word_end; ++word) {
      const int64_t unit0 = word * kWordBits;
      for (int64_t unit = unit0; unit < smaller(p.K, unit0 + kWordBits); ++unit) counts[unit] = 0;
      for (int64_t m = first; m < smaller(p.M, first + kSampleChunk); ++m) {
        const uint64_t signs = p.x[m * p.words + word];
        for (uint64_t left = p.gate[m * p.gate_stride + word] & valid_bits(word, p.K); left != 0; left &= left - 1) {
          const int bit = __builtin_ctzll(left);
          const int64_t unit = unit0 + bit;
          lists[unit * p.capacity + counts[unit]++] = static_cast<uint8_t>(2 * (m - first) + (~signs >> bit & 1));
        }
      }
    }
  }
}

void gated_weight_grad(const GatedWeightGrad& p, int64_t n_begin, int64_t n_end, int64_t k_begin, int64_t k_end,
                       float* dw, int64_t dw_stride) {
  alignas(64) float d[kSampleChunk * kTileOutputs];
  alignas(64) float tile[kTileUnits * kTileOutputs];
  for (int64_t n = n_begin; n < n_end; n += kTileOutputs) {
    const int64_t outputs = smaller<int64_t>(kTileOutputs, n_end - n);
    int64_t first = 0;
    do {  // at least once: an empty batch has a gradient of zeros
      const uint8_t* lists = p.lists + first / kSampleChunk * p.K * p.capacity;
      const int32_t* counts = p.counts + first / kSampleChunk * p.K;
      for (int64_t m = first; m < smaller(p.M, first + kSampleChunk); ++m) {
        float* row = d + (m - first) * kTileOutputs;
        for (int64_t j = 0; j < outputs; ++j) row[j] = p.d[m * p.N + n + j];
        for (int64_t j = outputs; j < kTileOutputs; ++j) row[j] = 0.0f;
      }
      for (int64_t k = k_begin; k < k_end; k += kTileUnits) {
        const int64_t units = smaller<int64_t>(kTileUnits, k_end - k);
        float* block = dw + (n - n_begin) * dw_stride + k - k_begin;
        for (int64_t u = 0; u < units; ++u) {
          float* sums = tile + u * kTileOutputs;
          if (first > 0)  // go on from the chunks before
            for (int64_t j = 0; j < outputs; ++j) sums[j] = block[j * dw_stride + u];
          const int32_t count = p.M > 0 ? counts[k + u] : 0;
          add_samples(d, lists + (k + u) * p.capacity, count, first > 0, sums);
        }
        write_transposed(tile, kTileOutputs, units, outputs, block, dw_stride);
      }
      first += kSampleChunk;
    } while (first < p.M);
  }
}

}  // namespace engram::cpu::ENGRAM_ISA
