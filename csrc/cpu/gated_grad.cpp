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
#include "cpu/simd.h"
#include "cpu/tables.h"

namespace engram::cpu::ENGRAM_ISA {

namespace {

constexpr int kUnits = 8;

// dx at `units` of sample m; entries past `n_units` repeat a unit and are not written.
ENGRAM_INLINE void dots_at(const GatedInputGrad& p, int64_t m, const int64_t* units, int n_units) {
  const int64_t words = words_for(p.N);
  const float* d = p.d + m * p.N;
  const uint64_t* w[kUnits];
  for (int u = 0; u < kUnits; ++u) w[u] = p.w_t + units[u < n_units ? u : 0] * words;
  Floats acc[kUnits];
  for (int u = 0; u < kUnits; ++u) acc[u] = zero();
  int64_t n = 0;
  for (; n + kLanes <= p.N; n += kLanes) {
    const Floats value = load(d + n);
#pragma GCC unroll 8
    for (int u = 0; u < kUnits; ++u) acc[u] = add_where(acc[u], mask_at(w[u], n), value);
  }
  if (n < p.N) {
    float tail[kLanes] = {};
    for (int64_t i = n; i < p.N; ++i) tail[i - n] = d[i];
    const Floats value = load(tail);
    for (int u = 0; u < kUnits; ++u) acc[u] = add_where(acc[u], mask_at(w[u], n), value);
  }
  for (int u = 0; u < n_units; ++u) p.dx[m * p.K + units[u]] = 2.0f * total(acc[u]) - p.d_sum[m];
}

constexpr int kTileUnits = 16;
constexpr int kTileOutputs = 64;
constexpr int kVectors = kTileOutputs / kLanes;

// One row of the tile: the sum over a unit's samples of +-d[m, n .. n + kTileOutputs).
ENGRAM_INLINE void sum_of_samples(const float* d, const uint8_t* list, int32_t plus, int32_t minus, float* out) {
  Floats acc[kVectors];
  for (int v = 0; v < kVectors; ++v) acc[v] = zero();
  for (int32_t i = 0; i < plus; ++i) {
    const float* row = d + list[i] * kTileOutputs;
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) acc[v] = add(acc[v], load(row + v * kLanes));
  }
  for (int32_t i = 0; i < minus; ++i) {
    const float* row = d + list[kSampleChunk - 1 - i] * kTileOutputs;
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) acc[v] = subtract(acc[v], load(row + v * kLanes));
  }
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
  for (int64_t word = word_begin; word < word_end; ++word) {
    const int64_t first = word * kWordBits, units = smaller(kWordBits, p.K - first);
    int32_t* counts = p.counts + 2 * first;
    for (int64_t i = 0; i < 2 * units; ++i) counts[i] = 0;
    for (int64_t m = p.chunk_begin; m < p.chunk_end; ++m) {
      const uint64_t signs = p.x[m * p.words + word];
      uint64_t left = valid_bits(word, p.K);
      if (p.gate != nullptr) left &= p.gate[m * p.gate_stride + word];
      for (; left != 0; left &= left - 1) {
        const int unit = __builtin_ctzll(left);
        const int minus = static_cast<int>(~signs >> unit & 1);
        const int32_t position = counts[2 * unit + minus]++;
        p.lists[(first + unit) * kSampleChunk + (minus ? kSampleChunk - 1 - position : position)] =
            static_cast<uint8_t>(m - p.chunk_begin);
      }
    }
  }
}

void gated_weight_grad(const GatedWeightGrad& p, int64_t n_begin, int64_t n_end) {
  alignas(64) float d[kSampleChunk * kTileOutputs];
  alignas(64) float tile[kTileUnits * kTileOutputs];
  const bool first_chunk = p.chunk_begin == 0;
  for (int64_t n = n_begin; n < n_end; n += kTileOutputs) {
    const int64_t outputs = smaller<int64_t>(kTileOutputs, n_end - n);
    for (int64_t m = p.chunk_begin; m < p.chunk_end; ++m) {
      float* row = d + (m - p.chunk_begin) * kTileOutputs;
      for (int64_t j = 0; j < outputs; ++j) row[j] = p.d[m * p.N + n + j];
      for (int64_t j = outputs; j < kTileOutputs; ++j) row[j] = 0.0f;
    }
    for (int64_t k = 0; k < p.K; k += kTileUnits) {
      const int64_t units = smaller<int64_t>(kTileUnits, p.K - k);
      for (int64_t u = 0; u < units; ++u)
        sum_of_samples(d, p.lists + (k + u) * kSampleChunk, p.counts[2 * (k + u)], p.counts[2 * (k + u) + 1],
                       tile + u * kTileOutputs);
      float* dw = p.dw + n * p.K + k;
      if (first_chunk && units == kTileUnits) {
        int64_t j = 0;
        for (; j + kTransposeSize <= outputs; j += kTransposeSize)
          for (int64_t u = 0; u < kTileUnits; u += kTransposeSize)
            transpose_floats(tile + u * kTileOutputs + j, kTileOutputs, dw + j * p.K + u, p.K);
        for (; j < outputs; ++j)
          for (int64_t u = 0; u < units; ++u) dw[j * p.K + u] = tile[u * kTileOutputs + j];
      } else {
        for (int64_t j = 0; j < outputs; ++j)
          for (int64_t u = 0; u < units; ++u)
            dw[j * p.K + u] = (first_chunk ? 0.0f : dw[j * p.K + u]) + tile[u * kTileOutputs + j];
      }
    }
  }
}

}  // namespace engram::cpu::ENGRAM_ISA
