// The two products of the backward pass, at a cost proportional to the recruited units.
//
//   gated_input_grad   dx[m,k]  = mask[m,k] sum_n d[m,n] s(W[n,k])      mask = gate & window, d [M, N], dx [M, K]
//   gated_weight_grad  dW[n,k]  = sum_m d[m,n] g[m,k] s(x[m,k])         dW [N, K]
//
// gated_input_grad reads W by columns (its sign bits transposed, [K, words_for(N)]). For a sample, the sums of
// kTableSigns consecutive signed terms d[m,n] are tabulated, a register per table; recruited units are lanes, their
// next signs index the table: a permutation, a shift and an addition for kTableSigns terms of kLanes units. Bound by
// those three. Without a register that can be a table (NEON, plain C++): one masked addition a term.
//
// gated_weight_grad visits, per unit, only the samples that recruited it (listed once per call): vector additions of
// rows of d into a tile of a word of units x kTileOutputs, transposed on its way out. Bound by reading the rows from
// the first-level cache, or at low rates by writing dW once. Units with about as many samples are worked on one after
// the other, since the processor would mispredict the end of every other list, and kUnitsAtOnce together, since the
// additions to one wait for each other.
//
// Where many units are recruited, the operator takes sign_product instead.
#include <cstring>

#include "cpu/simd.h"
#include "cpu/tables.h"

namespace engram::cpu::ENGRAM_ISA {

namespace {

constexpr int64_t kSigns32 = 32;  // signs of W that are read together

#if defined(ENGRAM_HAS_LOOK_UP)

constexpr int kBlocks = 4;
constexpr int kUnits = kBlocks * kLanes;  // units that share a look-up table while it is in a register
constexpr int64_t kOutputsAtOnce = 1024;  // whose tables, 11 or 16 KiB, stay in the first-level cache
constexpr int kTables = (kSigns32 + kTableSigns - 1) / kTableSigns;  // for 32 outputs; the last may be short of terms

class InputGradRow {
 public:
  InputGradRow(const GatedInputGrad& p, int64_t m, int64_t n)
      : p_(p), m_(m), n_(n), outputs_(smaller(kOutputsAtOnce, p.N - n)) {
    const float* d = p.d + m * p.N + n;
    for (int64_t i = 0; i < outputs_; i += kSigns32) {
      float terms[kTables * kTableSigns] = {};
      for (int64_t j = 0; j < smaller(kSigns32, outputs_ - i); ++j) terms[j] = d[i + j];
      for (int t = 0; t < kTables; ++t) store(tables_[i / kSigns32 * kTables + t], table_of(terms + t * kTableSigns));
    }
  }

  // Adds to dx at `units`; entries past `n_units` repeat a unit and are not written.
  void add_at(const int64_t* units, int n_units) const {
    constexpr int kWords = kTransposeSize;  // 32-bit words of every unit's signs that are fetched together
    const int64_t row_words = 2 * words_for(p_.N), first_word = n_ / kSigns32;
    const auto* signs = reinterpret_cast<const char*>(p_.w_t);
    Floats sum[kBlocks];
    for (int b = 0; b < kBlocks; ++b) sum[b] = zero();
    for (int64_t word = 0; word * kSigns32 < outputs_; word += kWords) {
      const int64_t words = smaller<int64_t>(kWords, row_words - first_word - word);
      uint32_t rows[kUnits][kWords], indices[kWords][kUnits];
      for (int u = 0; u < kUnits; ++u) {
        const char* from = signs + (units[u < n_units ? u : 0] * row_words + first_word + word) * 4;
        if (words == kWords) {
          memcpy(rows[u], from, sizeof rows[u]);
        } else {
          memset(rows[u], 0, sizeof rows[u]);
          memcpy(rows[u], from, static_cast<size_t>(words) * 4);
        }
      }
      for (int u = 0; u < kUnits; u += kTransposeSize) transpose_block(rows[u], kWords, &indices[0][u], kUnits);
      const int64_t used = smaller<int64_t>(kWords, (outputs_ + kSigns32 - 1) / kSigns32 - word);
      for (int64_t i = 0; i < used; ++i) {
        Bits index[kBlocks];
        for (int b = 0; b < kBlocks; ++b) index[b] = load_indices(&indices[i][b * kLanes]);
        const auto* tables = &tables_[(word + i) * kTables];
#pragma GCC unroll 11
        for (int t = 0; t < kTables; ++t) {
          const Floats table = load(tables[t]);
#pragma GCC unroll 4
          for (int b = 0; b < kBlocks; ++b) {
            sum[b] = add(sum[b], look_up(table, index[b]));
            index[b] = next_indices(index[b]);
          }
        }
      }
    }
    float sums[kUnits];
    for (int b = 0; b < kBlocks; ++b) store(sums + b * kLanes, sum[b]);
    for (int u = 0; u < n_units; ++u) p_.dx[m_ * p_.K + units[u]] += sums[u];
  }

 private:
  // Entry e: the sum of the terms, each with sign +1 where its bit of e is 1.
  static Floats table_of(const float* terms) {
    constexpr uint32_t kMinus[] = {0x5555, 0x3333, 0x0F0F, 0x00FF};  // entries whose bit is 0
    Floats table = flip_where(kMinus[0], all(terms[0]));
    for (int i = 1; i < kTableSigns; ++i) table = add(table, flip_where(kMinus[i], all(terms[i])));
    return table;
  }

  const GatedInputGrad& p_;
  const int64_t m_, n_, outputs_;
  alignas(64) float tables_[kOutputsAtOnce / kSigns32 * kTables][kLanes];
};

#else  // no register that could be a table: additions under masks

constexpr int kUnits = 8;
constexpr int64_t kOutputsAtOnce = INT64_MAX;

class InputGradRow {
 public:
  InputGradRow(const GatedInputGrad& p, int64_t m, int64_t) : p_(p), m_(m) {
    const float* d = p.d + m * p.N;
    Floats sum = zero();
    int64_t n = 0;
    for (; n + kLanes <= p.N; n += kLanes) sum = add(sum, load(d + n));
    sum_ = total(sum);
    for (; n < p.N; ++n) sum_ += d[n];
  }

  // Adds to dx at `units`; entries past `n_units` repeat a unit and are not written.
  void add_at(const int64_t* units, int n_units) const {
    const int64_t words = words_for(p_.N);
    const float* d = p_.d + m_ * p_.N;
    const uint64_t* w[kUnits];
    Floats acc[kUnits];
    for (int u = 0; u < kUnits; ++u) w[u] = p_.w_t + units[u < n_units ? u : 0] * words;
    for (int u = 0; u < kUnits; ++u) acc[u] = zero();
    int64_t n = 0;
    for (; n + kSigns32 <= p_.N; n += kSigns32) add_signs(d + n, w, n, acc);
    if (n < p_.N) {
      float tail[kSigns32] = {};
      for (int64_t i = n; i < p_.N; ++i) tail[i - n] = d[i];
      add_signs(tail, w, n, acc);
    }
    for (int u = 0; u < n_units; ++u) p_.dx[m_ * p_.K + units[u]] += 2.0f * total(acc[u]) - sum_;
  }

 private:
  static void add_signs(const float* d, const uint64_t* const* w, int64_t n, Floats* acc) {
    for (int u = 0; u < kUnits; ++u) {
      const Bits32 bits = bits32(static_cast<uint32_t>(w[u][n / kWordBits] >> n % kWordBits));
      for (int v = 0; v < static_cast<int>(kSigns32) / kLanes; ++v)
        acc[u] = add_where(acc[u], mask_of(bits, v), load(d + v * kLanes));
    }
  }

  const GatedInputGrad& p_;
  const int64_t m_;
  float sum_ = 0.0f;
};

#endif

constexpr int kTileOutputs = 64;
constexpr int kVectors = kTileOutputs / kLanes;
constexpr int kUnitsAtOnce = kVectors <= 4 ? 2 : 1;  // whose sums the registers hold
constexpr int kStepSamples = 2;                      // of each of these units, that a step adds
constexpr int kStepEntries = kStepSamples * kUnitsAtOnce;
static_assert(kWordBits % kUnitsAtOnce == 0);

// An entry of a list: the sample's place in the chunk, which may be kNoSample, and whether its sign is -1.
constexpr int kEntryShift = 8;
constexpr int64_t kNoSample = kSampleChunk;  // a row of zeros
constexpr uint16_t entry_of(int64_t sample, uint64_t negative) {
  return static_cast<uint16_t>(sample << kEntryShift | static_cast<int64_t>(negative));
}
static_assert(kNoSample << kEntryShift <= UINT16_MAX);

// kUnitsAtOnce rows of the tile, or what is added to them: the sums over the units' samples of +-d[m, n .. n +
// kTileOutputs). One loop over both signs and all units.
ENGRAM_INLINE void add_samples(const float* d, const uint16_t* list, int steps, bool go_on, float* const* out) {
  static constexpr float kSign[2] = {1.0f, -1.0f};
  Floats acc[kUnitsAtOnce][kVectors];
#pragma GCC unroll 2
  for (int u = 0; u < kUnitsAtOnce; ++u)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) acc[u][v] = go_on ? load(out[u] + v * kLanes) : zero();
  for (int step = 0; step < steps; ++step, list += kStepEntries) {
    uint64_t entries = 0;  // read at once
    memcpy(&entries, list, kStepEntries * sizeof *list);
#pragma GCC unroll 4
    for (int i = 0; i < kStepEntries; ++i) {
      const uint64_t entry = entries >> (16 * i) & 0xFFFFu;
      const float* row = d + (entry >> kEntryShift) * kTileOutputs;
      const Floats sign = all(kSign[entry & 1]);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v)
        acc[i % kUnitsAtOnce][v] = add_product(acc[i % kUnitsAtOnce][v], sign, load(row + v * kLanes));
    }
  }
#pragma GCC unroll 2
  for (int u = 0; u < kUnitsAtOnce; ++u)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) store(out[u] + v * kLanes, acc[u][v]);
}

}  // namespace

void gated_input_grad(const GatedInputGrad& p, Range samples) {
  for (int64_t m = samples.begin; m < samples.end; ++m)
    for (int64_t k = 0; k < p.K; ++k) p.dx[m * p.K + k] = 0.0f;
  // the signs of so many outputs stay in the second-level cache while they meet all samples
  for (int64_t n = 0; n < p.N; n += smaller(kOutputsAtOnce, p.N)) {
    for (int64_t m = samples.begin; m < samples.end; ++m) {
      const uint64_t* mask = p.mask + m * p.mask_stride;
      const InputGradRow row(p, m, n);
      int64_t units[kUnits];
      int n_units = 0;
      for (int64_t word = 0; word * kWordBits < p.K; ++word) {
        for (uint64_t left = mask[word] & valid_bits(word, p.K); left != 0; left &= left - 1) {
          units[n_units++] = word * kWordBits + __builtin_ctzll(left);
          if (n_units == kUnits) {
            row.add_at(units, kUnits);
            n_units = 0;
          }
        }
      }
      if (n_units > 0) row.add_at(units, n_units);
    }
  }
}

void list_samples(const GatedWeightGrad& p, Range words) {
  uint16_t lists[kWordBits][kSampleChunk];
  for (int64_t first = 0; first < p.M; first += kSampleChunk) {
    for (int64_t word = words.begin; word < words.end; ++word) {
      uint8_t counts[kWordBits] = {};
      for (int64_t m = first; m < smaller(p.M, first + kSampleChunk); ++m) {
        const uint64_t signs = p.x[m * p.words + word];
        for (uint64_t left = p.gate[m * p.gate_stride + word] & valid_bits(word, p.K); left != 0; left &= left - 1) {
          const int unit = __builtin_ctzll(left);
          lists[unit][counts[unit]++] = entry_of(m - first, ~signs >> unit & 1);
        }
      }
      const int64_t at = first / kSampleChunk * p.words + word;
      uint8_t *order = p.order + at * kWordBits, *steps = p.steps + at * kWordBits;
      // sorted by the steps that they take alone, most first
      constexpr int64_t kMostSteps = kSampleChunk / kStepSamples;
      int places[kMostSteps + 2] = {};  // of those with one step less
      for (const uint8_t count : counts) ++places[(count + kStepSamples - 1) / kStepSamples];
      for (int64_t i = kMostSteps; i >= 0; --i) places[i] += places[i + 1];
      for (int64_t unit = 0; unit < kWordBits; ++unit)
        order[places[(counts[unit] + kStepSamples - 1) / kStepSamples + 1]++] = static_cast<uint8_t>(unit);
      uint16_t* to = p.lists + p.starts[at];
      for (int64_t i = 0; i < kWordBits; i += kUnitsAtOnce) {
        const int most = (counts[order[i]] + kStepSamples - 1) / kStepSamples;  // the first has the most steps
        steps[i] = static_cast<uint8_t>(most);
        for (int place = 0; place < most * kStepSamples; ++place)
          for (int u = 0; u < kUnitsAtOnce; ++u) {
            const int unit = order[i + u];
            *to++ = place < counts[unit] ? lists[unit][place] : entry_of(kNoSample, 0);
          }
      }
    }
  }
}

void gated_weight_grad(const GatedWeightGrad& p, Block part) {
  alignas(64) float d[(kSampleChunk + 1) * kTileOutputs];
  alignas(64) float tile[kWordBits * kTileOutputs];
  for (int64_t j = 0; j < kTileOutputs; ++j) d[kNoSample * kTileOutputs + j] = 0.0f;
  for (int64_t n = part.rows.begin; n < part.rows.end; n += kTileOutputs) {
    const int64_t outputs = smaller<int64_t>(kTileOutputs, part.rows.end - n);
    int64_t first = 0;
    do {  // at least once: an empty batch has a gradient of zeros
      for (int64_t m = first; m < smaller(p.M, first + kSampleChunk); ++m) {
        const float* from = p.d + m * p.d_stride + n;
        float* row = d + (m - first) * kTileOutputs;
        if (outputs == kTileOutputs) {
          memcpy(row, from, kTileOutputs * sizeof(float));
        } else {
          for (int64_t j = 0; j < kTileOutputs; ++j) row[j] = j < outputs ? from[j] : 0.0f;
        }
      }
      for (int64_t k = part.columns.begin; k < part.columns.end; k += kWordBits) {
        const int64_t units_of_tile = smaller(kWordBits, part.columns.end - k);
        float* block = p.dw + (n - part.rows.begin) * p.dw_stride + k - part.columns.begin;
        if (first > 0)  // go on from the chunks before
          write_transposed(block, p.dw_stride, outputs, units_of_tile, tile, kTileOutputs);
        const int64_t at = first / kSampleChunk * p.words + k / kWordBits;
        const uint16_t* list = p.lists + (p.M > 0 ? p.starts[at] : 0);
        for (int64_t i = 0; i < kWordBits; i += kUnitsAtOnce) {
          float* sums[kUnitsAtOnce];
          int steps = 0;
          for (int u = 0; u < kUnitsAtOnce; ++u)
            sums[u] = tile + (p.M > 0 ? p.order[at * kWordBits + i + u] : i + u) * kTileOutputs;
          if (p.M > 0) steps = p.steps[at * kWordBits + i];
          add_samples(d, list, steps, first > 0, sums);
          list += steps * kStepEntries;
        }
        write_transposed(tile, kTileOutputs, units_of_tile, outputs, block, p.dw_stride);
      }
      first += kSampleChunk;
    } while (first < p.M);
  }
}

}  // namespace engram::cpu::ENGRAM_ISA
