// Sums of signed numbers by look-up, the method of the Four Russians (Arlazarov et al. 1970): for four consecutive
// terms the 16 possible sums +-a[0] +-a[1] +-a[2] +-a[3] are tabulated, one 64-byte entry for a tile of numbers side by
// side. Every column of signs then costs one look-up and one addition for four terms. The tables of 64 consecutive
// terms fill 16 KiB of the first-level cache. uint8 terms are summed in int16, which holds 64 of them.
#pragma once

#include <cstring>

#include "cpu/simd.h"

namespace engram::cpu::ENGRAM_ISA {

constexpr int kSigns = 4;                                      // in a look-up
constexpr int kEntries = 1 << kSigns;                          // in the table of a group of four
constexpr int kEntryBytes = 64;                                // a tile of r
constexpr int kGroups = static_cast<int>(kWordBits) / kSigns;  // in a word
constexpr int kVectors = kEntryBytes / kVectorBytes;           // in an entry
constexpr int kIndexShift = 6;                                 // log2 kEntryBytes
constexpr uint64_t kIndexMask = uint64_t{kEntries - 1} << kIndexShift;

template <typename T>
using Vector [[gnu::vector_size(kVectorBytes)]] = T;

template <typename T>
struct Term;  // how numbers of type T are tabulated and summed
template <>
struct Term<float> {
  using Entry = float;
  using Sum = float;
};
template <>
struct Term<uint8_t> {
  using Entry = int16_t;
  using Sum = int32_t;
};

template <typename T>
constexpr int kTile = kEntryBytes / sizeof(typename Term<T>::Entry);  // rows r of a tile

template <typename T>
ENGRAM_INLINE Vector<T> load_vector(const void* p) {
  Vector<T> v;
  memcpy(&v, p, sizeof v);
  return v;
}

template <typename T>
ENGRAM_INLINE void store_vector(void* p, Vector<T> v) {
  memcpy(p, &v, sizeof v);
}

// The 16 sums of each group of four terms: of the terms with their sign, or with Subset of those whose bit is 1.
template <typename T, bool Subset>
ENGRAM_INLINE void tabulate(const typename Term<T>::Entry* terms, int64_t stride, int groups, char* table) {
  using Entry = typename Term<T>::Entry;
  for (int group = 0; group < groups; ++group, terms += kSigns * stride, table += kEntries * kEntryBytes) {
    for (int v = 0; v < kVectors; ++v) {
      Vector<Entry> term[kSigns], low[4], high[4];
      for (int i = 0; i < kSigns; ++i)
        term[i] = load_vector<Entry>(reinterpret_cast<const char*>(terms + i * stride) + v * kVectorBytes);
      const Vector<Entry> zero{};
      for (int b = 0; b < 4; ++b) {
        low[b] = (b & 1 ? term[0] : Subset ? zero : -term[0]) + (b & 2 ? term[1] : Subset ? zero : -term[1]);
        high[b] = (b & 1 ? term[2] : Subset ? zero : -term[2]) + (b & 2 ? term[3] : Subset ? zero : -term[3]);
      }
      for (int b = 0; b < kEntries; ++b)
        store_vector<Entry>(table + b * kEntryBytes + v * kVectorBytes, low[b & 3] + high[b >> 2]);
    }
  }
}

// The index of the first group comes to lie at kIndexShift, that of the next one kSigns bits higher.
ENGRAM_INLINE uint64_t indices_of(uint64_t word) { return word << kIndexShift | word >> (kWordBits - kIndexShift); }
ENGRAM_INLINE uint64_t next_index(uint64_t indices) { return indices >> kSigns | indices << (kWordBits - kSigns); }

// acc[c] = the sums of the terms of `groups` groups with the signs of word c of `plus`; with Subset those of the bits
// of plus less those of the bits of minus.
template <typename T, int Columns, bool Subset>
ENGRAM_INLINE void look_up_sums(const char* table, int groups, const uint64_t* plus, const uint64_t* minus,
                                Vector<typename Term<T>::Entry> (*acc)[kVectors]) {
  using Entry = typename Term<T>::Entry;
  uint64_t added[Columns], subtracted[Columns];
  for (int c = 0; c < Columns; ++c) {
    added[c] = indices_of(plus[c]);
    if constexpr (Subset) subtracted[c] = indices_of(minus[c]);
    for (int v = 0; v < kVectors; ++v) acc[c][v] = Vector<Entry>{};
  }
  for (int group = 0; group < groups; ++group, table += kEntries * kEntryBytes) {
#pragma GCC unroll 8
    for (int c = 0; c < Columns; ++c) {
      const char* entry = table + (added[c] & kIndexMask);
      added[c] = next_index(added[c]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[c][v] += load_vector<Entry>(entry + v * kVectorBytes);
      if constexpr (Subset) {
        const char* other = table + (subtracted[c] & kIndexMask);
        subtracted[c] = next_index(subtracted[c]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) acc[c][v] -= load_vector<Entry>(other + v * kVectorBytes);
      }
    }
  }
}

}  // namespace engram::cpu::ENGRAM_ISA
