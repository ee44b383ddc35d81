// Prepares filters and units of patch_excitability, and shares its samples out: launch.cpp says by which rules.
#include "core/bits.h"
#include "cpu/launch.h"
#include "cpu/share.h"

namespace engram::cpu {

namespace {

constexpr int64_t kEntryBytes = 2 * kPatchSamples;

void prepare_filters(const Runtime& rt, PreparedPatches& p) {
  const int64_t taps = p.size * p.size;
  auto* look_ups = workspace<uint16_t>(rt, p.F * p.size * p.windows);
  auto* zero_begin = workspace<int32_t>(rt, p.F + 1);
  auto* zero_taps = workspace<int32_t>(rt, p.F * taps);
  int32_t zeros = 0;
  for (int64_t f = 0; f < p.F; ++f) {
    zero_begin[f] = zeros;
    for (int64_t tap = 0; tap < taps; ++tap)
      if (p.filters[f * taps + tap] == 0) zero_taps[zeros++] = static_cast<int32_t>(tap);
    for (int64_t row = 0; row < p.size; ++row) {
      for (int64_t window = 0; window < p.windows; ++window) {
        int64_t entry = 0;
        for (int64_t i = 0; i < kPatchTaps && window * kPatchTaps + i < p.size; ++i)
          entry |= int64_t{p.filters[f * taps + row * p.size + window * kPatchTaps + i] >= 0} << i;
        look_ups[(f * p.size + row) * p.windows + window] =
            static_cast<uint16_t>((window * kPatchEntries + entry) * kEntryBytes);
      }
    }
  }
  zero_begin[p.F] = zeros;
  p.look_ups = look_ups, p.zero_begin = zero_begin, p.zero_taps = zero_taps;
}

// Where each place's units begin in p.units, [places * channels + 1].
const int64_t* units_by_place(const Runtime& rt, const PreparedPatches& p, int64_t places) {
  auto* begin = workspace<int64_t>(rt, places + 1);
  int64_t place = 0;
  for (int64_t n = 0; n < p.N; ++n)
    for (; place <= p.units[n] / p.F; ++place) begin[place] = n;
  for (; place <= places; ++place) begin[place] = p.N;
  return begin;
}

void prepare_places(const Runtime& rt, PreparedPatches& p) {
  const int64_t rows = p.height - p.size + 1, columns = p.width - p.size + 1;
  const int64_t places_down = rows - p.pool + 1, places_across = columns - p.pool + 1;
  const int64_t* begin = units_by_place(rt, p, places_down * places_across * p.channels);
  auto* filter_of = workspace<int32_t>(rt, p.N);
  for (int64_t n = 0; n < p.N; ++n) filter_of[n] = static_cast<int32_t>(p.units[n] % p.F);
  auto* needed = workspace<int32_t>(rt, p.channels * rows * columns);
  auto* visits = workspace<PatchFilter>(rt, p.N * p.pool * p.pool);
  auto* units = workspace<int32_t>(rt, p.N * p.pool * p.pool);
  auto* units_of = workspace<int32_t>(rt, p.F);  // here, and then where the next of them goes
  for (int64_t f = 0; f < p.F; ++f) units_of[f] = 0;
  p.needed = needed, p.visits = visits, p.visited_units = units;
  for (int64_t channel = 0; channel < p.channels; ++channel) {
    for (int64_t c = 0; c < columns; ++c) {
      for (int64_t r = 0; r < rows; ++r) {
        const auto for_each_unit = [&](const auto& f) {
          for (int64_t down = r < p.pool ? 0 : r - p.pool + 1; down <= r && down < places_down; ++down) {
            for (int64_t across = c < p.pool ? 0 : c - p.pool + 1; across <= c && across < places_across; ++across) {
              const int64_t place = (down * places_across + across) * p.channels + channel;
              for (int64_t n = begin[place]; n < begin[place + 1]; ++n) f(n, filter_of[n]);
            }
          }
        };
        int32_t filters = 0, before = 0;
        for_each_unit([&](int64_t, int32_t filter) {
          if (units_of[filter]++ == 0) visits[filters++].filter = filter;
        });
        for (int32_t i = 0; i < filters; ++i) {
          int32_t& of_filter = units_of[visits[i].filter];
          visits[i].units = of_filter;
          of_filter = before;
          before += visits[i].units;
        }
        for_each_unit([&](int64_t n, int32_t filter) { units[units_of[filter]++] = static_cast<int32_t>(n); });
        for (int32_t i = 0; i < filters; ++i) units_of[visits[i].filter] = 0;
        *needed++ = filters;
        visits += filters, units += before;
      }
    }
  }
}

}  // namespace

void patch_excitability(const Runtime& rt, const PatchExcitability& operands) {
  const Kernels& kernels = *active().load();
  PreparedPatches p{};
  static_cast<PatchExcitability&>(p) = operands;
  p.windows = ceil_div(p.size, kPatchTaps);
  prepare_filters(rt, p);
  prepare_places(rt, p);
  const int64_t tiles = ceil_div(p.M, kPatchSamples), shares = rt.threads < tiles ? rt.threads : tiles;
  if (shares == 0) return;
  constexpr int64_t kLine = 64;  // of the cache: shares write to none in common
  const int64_t bytes = ceil_div(patch_scratch_bytes(p, p.windows), kLine) * kLine;
  char* scratch = workspace<char>(rt, shares * bytes + kLine);
  scratch += (kLine - reinterpret_cast<uintptr_t>(scratch) % kLine) % kLine;
  share(rt, shares, tiles * p.height * p.width * p.size * 64 / shares, [&](Range part) {
    for (int64_t i = part.begin; i < part.end; ++i) {
      PreparedPatches own = p;
      own.scratch = scratch + i * bytes;
      kernels.patch_excitability(own, {tiles * i / shares, tiles * (i + 1) / shares});
    }
  });
}

}  // namespace engram::cpu
