// binary_matmul: y[m,n] = popc(g[m]) - 2 popc((x[m] ^ w[n]) & g[m])
//
// Operands as in core/operands.h; without a gate popc(g) = K. Padding bits of w do not count.
//
// Panel form: 2 * kBitLanes rows of w are re-laid word by word into a panel that stays in the first-level cache, and
// kTileRows samples meet it in registers. A word of x is broadcast; lane j of an accumulator is output column j, so
// there is no reduction across lanes. Per 512 bits: one xor (with the gate one vpternlog), one popcount, one add;
// those three bound the kernel. Re-laying costs one pass over w per call, 1 / M of the work.
// Dot form, for a few samples: words stream through both rows and lanes are summed at the end.
#include "cpu/simd.h"
#include "cpu/tables.h"

namespace engram::cpu::ENGRAM_ISA {

namespace {

constexpr int kPanel = 2 * kBitLanes;
constexpr int64_t kBlockWords = 128;    // words of a panel worked on together: 16 KiB of w with AVX-512
constexpr int64_t kBlockSamples = 240;  // whose words and gates stay in the second-level cache: a multiple of all tiles
// Up to kDotSamples samples re-laying w costs more than it saves, unless rows are so short that summing lanes at their
// end is most of the dot form's work.
constexpr int64_t kShortRow = 32;  // words

ENGRAM_INLINE int32_t recruited(const PreparedMatmul& p, int64_t m) {
  return p.recruited == nullptr ? static_cast<int32_t>(p.K) : p.recruited[p.gate_stride == 0 ? 0 : m];
}

// base - 2 * distance. Unsigned, since twice a distance may pass 2^31 where the difference does not.
ENGRAM_INLINE int32_t minus_twice(int32_t base, uint32_t distance) {
  return static_cast<int32_t>(static_cast<uint32_t>(base) - 2u * distance);
}

ENGRAM_INLINE void relay_panel(const PreparedMatmul& p, int64_t n, int64_t word, int64_t block, uint64_t* panel) {
  const int64_t whole = p.N - n >= kPanel ? block / kBitLanes * kBitLanes : 0;
  for (int64_t i = 0; i < whole; i += kBitLanes)
    for (int64_t j = 0; j < kPanel; j += kBitLanes)
      transpose_words(p.w + (n + j) * p.words + word + i, p.words, panel + i * kPanel + j, kPanel);
  for (int64_t j = 0; j < kPanel; ++j) {
    const uint64_t* row = p.w + (n + j) * p.words + word;
    for (int64_t i = whole; i < block; ++i) panel[i * kPanel + j] = n + j < p.N ? row[i] : 0;
  }
  for (int64_t i = p.K / kWordBits > word ? p.K / kWordBits - word : 0; i < block; ++i)
    for (int64_t j = 0; j < kPanel; ++j) panel[i * kPanel + j] &= valid_bits(word + i, p.K);
}

constexpr int64_t kTileWords = 1 + kGateParts;  // of a sample, for one of its words

// Adds the distances of Rows samples within their gates, for one word.
template <int Rows>
ENGRAM_INLINE void add_gated(const uint64_t* samples, Bits w0, Bits w1, Bits partial[][2]) {
  if constexpr (kGateInStages) {
    Bits v[2 * Rows];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Bits xr = bits_all(samples[r * kTileWords]), gr = bits_all(samples[r * kTileWords + 1]);
      v[2 * r] = differ_within(xr, w0, gr);
      v[2 * r + 1] = differ_within(xr, w1, gr);
    }
    for (Bits& distance : v) in_order(distance);
    for (Bits& distance : v) distance = count(distance);
    for (Bits& counts : v) in_order(counts);
    for (int i = 0; i < 2 * Rows; ++i) partial[i / 2][i % 2] = add_count(partial[i / 2][i % 2], v[i]);
  } else {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const uint64_t* gate = samples + r * kTileWords + 1;
      const Bits xr = bits_all(samples[r * kTileWords]);
      partial[r][0] = add_count(partial[r][0], count_where(xr, w0, gate));
      partial[r][1] = add_count(partial[r][1], count_where(xr, w1, gate));
    }
  }
}

// Rows samples from m against a panel: distance[r][j] = popc((x[m + r] ^ w[n + j]) & g).
template <int Rows, bool Gated>
ENGRAM_INLINE void tile(const PreparedMatmul& p, int64_t m, int64_t word, int64_t block, const uint64_t* panel,
                        uint32_t distance[][kPanel]) {
  Bits wide[Rows][2];
  for (int r = 0; r < Rows; ++r) wide[r][0] = wide[r][1] = bits_zero();
  const uint64_t* x = p.x + m * p.words + word;
  const uint64_t* samples = Gated ? p.tiles + (m * p.words + word * Rows) * kTileWords : nullptr;
  for (int64_t first = 0; first < block;) {
    const int64_t last = smaller(block, first + kCountSteps);
    Bits partial[Rows][2];
    for (int r = 0; r < Rows; ++r) partial[r][0] = partial[r][1] = bits_zero();
    for (int64_t i = first; i < last; ++i) {
      const Bits w0 = bits_load(panel + i * kPanel), w1 = bits_load(panel + i * kPanel + kBitLanes);
      if constexpr (Gated) {
        add_gated<Rows>(samples + i * Rows * kTileWords, w0, w1, partial);
      } else {
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
          const Bits xr = bits_all(x[r * p.words + i]);
          partial[r][0] = add_count(partial[r][0], count(differ(xr, w0)));
          partial[r][1] = add_count(partial[r][1], count(differ(xr, w1)));
        }
      }
    }
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < 2; ++v) wide[r][v] = add_wide(wide[r][v], widen(partial[r][v]));
    first = last;
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < 2; ++v) store_low(&distance[r][v * kBitLanes], wide[r][v]);
}

// Inlined with `columns` known, so that whole panels are vectorised. y starts as `base`, at word 0.
ENGRAM_INLINE void subtract_twice(int64_t word, int32_t base, const uint32_t* distance, int64_t columns, int32_t* y) {
  if (word == 0)
    for (int64_t j = 0; j < columns; ++j) y[j] = minus_twice(base, distance[j]);
  else
    for (int64_t j = 0; j < columns; ++j) y[j] = minus_twice(y[j], distance[j]);
}

template <int Rows, bool Gated>
void tile_rows(const PreparedMatmul& p, int64_t m, int64_t n, int64_t word, int64_t block, const uint64_t* panel) {
  uint32_t distance[Rows][kPanel];
  tile<Rows, Gated>(p, m, word, block, panel, distance);
  for (int r = 0; r < Rows; ++r) {
    int32_t* y = p.y + (m + r) * p.N + n;
    if (p.N - n >= kPanel)
      subtract_twice(word, recruited(p, m + r), distance[r], kPanel, y);
    else
      subtract_twice(word, recruited(p, m + r), distance[r], p.N - n, y);
  }
}

template <int Rows, bool Gated>
void tile_remainder(const PreparedMatmul& p, int64_t rows, int64_t m, int64_t n, int64_t word, int64_t block,
                    const uint64_t* panel) {
  if constexpr (Rows > 0) {
    if (rows == Rows)
      tile_rows<Rows, Gated>(p, m, n, word, block, panel);
    else
      tile_remainder<Rows - 1, Gated>(p, rows, m, n, word, block, panel);
  }
}

template <bool Gated>
void panel_form(const PreparedMatmul& p, Range samples, Range outputs) {
  constexpr int kRows = Gated ? kGatedTileRows : kTileRows;
  alignas(64) uint64_t panel[kBlockWords * kPanel];
  for (int64_t n = outputs.begin; n < outputs.end; n += kPanel) {
    for (int64_t word = 0; word < p.words; word += kBlockWords) {
      const int64_t block = smaller(kBlockWords, p.words - word);
      relay_panel(p, n, word, block, panel);
      int64_t m = samples.begin;
      for (; m + kRows <= samples.end; m += kRows) tile_rows<kRows, Gated>(p, m, n, word, block, panel);
      tile_remainder<kRows - 1, Gated>(p, samples.end - m, m, n, word, block, panel);
    }
  }
}

// n <= kBitLanes words from p, the rest zero.
ENGRAM_INLINE Bits load_words(const uint64_t* p, int64_t n) {
  if (n == kBitLanes) return bits_load(p);
  uint64_t block[kBitLanes] = {};
  for (int64_t i = 0; i < n; ++i) block[i] = p[i];
  return bits_load(block);
}

// valid_bits of kBitLanes words from `word` on.
ENGRAM_INLINE Bits valid_words(int64_t word, int64_t k) {
  uint64_t block[kBitLanes];
  for (int64_t i = 0; i < kBitLanes; ++i) block[i] = valid_bits(word + i, k);
  return bits_load(block);
}

constexpr int kDotColumns = 4;

// Adds to partial[j] the counts of `block` vectors of words, from word i.
template <bool Gated>
ENGRAM_INLINE void count_block(const uint64_t* x, const uint64_t* g, const uint64_t* const* w, int64_t i, int64_t block,
                               Bits* partial) {
  for (const int64_t end = i + block * kBitLanes; i < end; i += kBitLanes) {
    const Bits xi = bits_load(x + i);
    const Bits gi = Gated ? bits_load(g + i) : xi;
#pragma GCC unroll 4
    for (int j = 0; j < kDotColumns; ++j) {
      const Bits wj = bits_load(w[j] + i);
      partial[j] = add_count(partial[j], count(Gated ? differ_within(xi, wj, gi) : differ(xi, wj)));
    }
  }
}

template <bool Gated>
void dot_form(const PreparedMatmul& p, Range samples, Range outputs) {
  const int64_t vectors = p.K / kWordBits / kBitLanes;  // without padding
  for (int64_t n = outputs.begin; n < outputs.end; n += kDotColumns) {
    const int columns = static_cast<int>(smaller<int64_t>(kDotColumns, outputs.end - n));
    const uint64_t* w[kDotColumns];
    for (int j = 0; j < kDotColumns; ++j) w[j] = p.w + (n + (j < columns ? j : 0)) * p.words;
    for (int64_t m = samples.begin; m < samples.end; ++m) {
      const uint64_t* x = p.x + m * p.words;
      const uint64_t* g = Gated ? p.gate + m * p.gate_stride : nullptr;
      Bits wide[kDotColumns], partial[kDotColumns];
      for (int j = 0; j < kDotColumns; ++j) wide[j] = bits_zero();
      for (int64_t first = 0; first < vectors; first += kCountSteps) {
        for (int j = 0; j < kDotColumns; ++j) partial[j] = bits_zero();
        count_block<Gated>(x, g, w, first * kBitLanes, smaller(kCountSteps, vectors - first), partial);
        for (int j = 0; j < kDotColumns; ++j) wide[j] = add_wide(wide[j], widen(partial[j]));
      }
      for (int64_t i = vectors * kBitLanes; i < p.words; i += kBitLanes) {
        const int64_t tail = smaller<int64_t>(kBitLanes, p.words - i);
        const Bits xi = load_words(x + i, tail), gi = Gated ? load_words(g + i, tail) : valid_words(i, p.K);
        for (int j = 0; j < kDotColumns; ++j)
          wide[j] = add_wide(wide[j], widen(count(differ_within(xi, load_words(w[j] + i, tail), gi))));
      }
      const int32_t base = recruited(p, m);
      for (int j = 0; j < columns; ++j)
        p.y[m * p.N + n + j] = minus_twice(base, static_cast<uint32_t>(bits_total(wide[j])));
    }
  }
}

template <bool Gated>
void product(const PreparedMatmul& p, Range samples, Range outputs) {
  if (samples.end - samples.begin <= (p.words < kShortRow ? 0 : kDotSamples))
    dot_form<Gated>(p, samples, outputs);
  else
    for (int64_t m = samples.begin; m < samples.end; m += kBlockSamples)
      panel_form<Gated>(p, {m, smaller(samples.end, m + kBlockSamples)}, outputs);
}

}  // namespace

void tile_samples(const TileSamples& p, Range tiles) {
  for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
    const int64_t first = tile * kGatedTileRows, rows = smaller<int64_t>(kGatedTileRows, p.M - first);
    uint64_t* to = p.tiles + first * p.words * kTileWords;
    for (int64_t word = 0; word < p.words; ++word)
      for (int64_t m = first; m < first + rows; ++m, to += kTileWords) {
        *to = p.x[m * p.words + word];
        split_gate(p.gate[m * p.gate_stride + word], to + 1);
      }
  }
}

void binary_matmul(const PreparedMatmul& p, Block part) {
  if (p.gate == nullptr)
    product<false>(p, part.rows, part.columns);
  else
    product<true>(p, part.rows, part.columns);
}

}  // namespace engram::cpu::ENGRAM_ISA
