// The checker: every access of a kernel to shared and global memory is checked for bounds, permission, races and
// initialisation. README.md says how; in short, kernels are compiled for ThreadSanitizer and
// UndefinedBehaviorSanitizer, and the functions that such code calls are defined here.
#include "checker.h"

#include <algorithm>
#include <cstdlib>
#include <memory>

// Bounds of the library, by the linker.
extern "C" {
__attribute__((visibility("hidden"))) extern const char __ehdr_start[];
__attribute__((visibility("hidden"))) extern const char _end[];
}

namespace engram::emulator::checker {
namespace {

constexpr unsigned kWarp = 32;
constexpr uint32_t kSiteBit = uint32_t{1} << 31;  // of a place

// One access. `clock`: of the thread, which a synchronization in which it takes part moves on. `place`: an offset in
// the library's code, or kSiteBit and an index of `sites`.
struct Stamp {
  uint32_t block;  // of all since the library was loaded; 0: no access
  uint32_t thread : 10, atomic : 1, clock : 21;
  uint32_t place;
};

// The latest access, and the latest before it by another thread, by another warp and by another block: with whichever
// of them a later access may race.
struct History {
  Stamp latest, other_thread, other_warp, other_block;

  void add(const Stamp& stamp) {
    if (latest.block != stamp.block)
      other_block = other_warp = other_thread = latest;
    else if (latest.thread / kWarp != stamp.thread / kWarp)
      other_warp = other_thread = latest;
    else if (latest.thread != stamp.thread)
      other_thread = latest;
    latest = stamp;
  }
};

// A byte of memory. Starts as zeros, and is never cleared: stamps of blocks and launches that are over mean nothing.
struct Cell {
  History reads, writes;
};

struct Free {
  void operator()(void* p) const { free(p); }
};
using Cells = std::unique_ptr<Cell[], Free>;

// Memory of the system that nobody touches costs nothing.
Cells make_cells(size_t bytes) { return Cells(static_cast<Cell*>(calloc(std::max<size_t>(bytes, 1), sizeof(Cell)))); }

struct CheckedRegion {
  Region region;
  Cells cells;
};

std::vector<CheckedRegion> regions;
std::vector<SharedArray> shared_arrays;  // by offset
Cells shared_cells;
std::vector<uint32_t> in_flight;  // of every byte of shared memory: the block that copies to it asynchronously

uint32_t first_block = 0;  // of the launch
std::vector<Site> sites;

// What a thread knows of others: their accesses up to these clocks came before.
std::vector<uint32_t> clocks;      // of every thread
std::vector<uint32_t> at_barrier;  // of every thread, when the block last synchronized
std::vector<uint32_t> seen;        // [thread][lane] clock of another lane of its warp, when they last synchronized

// ---- names and places

// Where an access was made: a site, or else an address in the code.
struct Place {
  Site site;
  const void* pc;
};

uint32_t number_of(const Place& place) {
  if (place.site.file == nullptr)
    return static_cast<uint32_t>(static_cast<const char*>(place.pc) - static_cast<const char*>(__ehdr_start));
  const auto same = [&](const Site& site) { return site.file == place.site.file && site.line == place.site.line; };
  const auto found = std::find_if(sites.begin(), sites.end(), same);
  const auto index = static_cast<uint32_t>(found - sites.begin());
  if (found == sites.end()) sites.push_back(place.site);
  return kSiteBit | index;
}

Place place_of(uint32_t number) {
  if ((number & kSiteBit) != 0) return {sites[number & ~kSiteBit], nullptr};
  return {{nullptr, 0}, __ehdr_start + number};
}

std::string element(const std::string& name, size_t byte) { return name + ", byte " + std::to_string(byte); }

const char* verb(Access kind) {
  return kind == Access::kRead ? "read" : kind == Access::kWrite ? "write" : "atomic update";
}
const char* with_article(Access kind) {
  return kind == Access::kRead ? "a read" : kind == Access::kWrite ? "a write" : "an atomic update";
}

// ---- races

// An access that is about to be made to a region or a shared array.
struct Attempt {
  Access kind;
  const Running& me;
  const Place& place;
  const std::string& name;
  uint32_t first_block;  // whose accesses matter: of shared memory, only those of the same block
};

bool happened_before(const Stamp& stamp, const Attempt& attempt) {
  const Running& me = attempt.me;
  if (stamp.block < attempt.first_block) return true;
  if (stamp.block != me.block) return false;
  if (stamp.thread == me.thread) return true;
  if (stamp.thread / kWarp == me.warp) return stamp.clock <= seen[me.thread * kWarp + stamp.thread % kWarp];
  return stamp.clock <= at_barrier[stamp.thread];
}

void check_race(const History& history, Access earlier, const Attempt& attempt, size_t byte) {
  for (const Stamp& stamp : {history.latest, history.other_thread, history.other_warp, history.other_block}) {
    if (happened_before(stamp, attempt) || (stamp.atomic != 0 && attempt.kind == Access::kAtomic)) continue;
    const Place before = place_of(stamp.place);
    const bool same_block = stamp.block == attempt.me.block;
    fail(std::string("race: ") + verb(attempt.kind) + " of " + element(attempt.name, byte) + ", after " +
             with_article(stamp.atomic != 0 ? Access::kAtomic : earlier) + " by " +
             (same_block ? "thread " + std::to_string(stamp.thread) + " of this block" : "another block") +
             where(before.site, before.pc) + ", with no synchronization between",
         attempt.place.site, attempt.place.pc);
  }
}

void check_races(const Cell& cell, const Attempt& attempt, size_t byte) {
  check_race(cell.writes, Access::kWrite, attempt, byte);
  if (attempt.kind != Access::kRead) check_race(cell.reads, Access::kRead, attempt, byte);
}

void record(Cell& cell, Access kind, const Running& me, uint32_t place) {
  const Stamp stamp{me.block, me.thread, kind == Access::kAtomic, clocks[me.thread], place};
  (kind == Access::kRead ? cell.reads : cell.writes).add(stamp);
}

// ---- shared memory

// The array of these bytes of shared memory.
const SharedArray& array_at(size_t offset, size_t bytes, Access kind, const Place& place) {
  const auto after = std::upper_bound(shared_arrays.begin(), shared_arrays.end(), offset,
                                      [](size_t at, const SharedArray& array) { return at < array.offset; });
  if (after == shared_arrays.begin()) fail("an access to shared memory before its first array", place.site, place.pc);
  const SharedArray& array = *(after - 1);
  if (offset + bytes > array.offset + array.bytes)
    fail(std::string("out of bounds: ") + verb(kind) + " of " + std::to_string(bytes) + " bytes of shared memory at " +
             element(array.name, offset - array.offset) + " of " + std::to_string(array.bytes),
         place.site, place.pc);
  return array;
}

void access_shared(size_t offset, size_t bytes, Access kind, const Running& me, const Place& place) {
  const SharedArray& array = array_at(offset, bytes, kind, place);
  const Attempt attempt{kind, me, place, array.name, me.block};
  const uint32_t number = number_of(place);
  for (size_t i = offset; i < offset + bytes; ++i) {
    Cell& cell = shared_cells[i];
    const size_t byte = i - array.offset;
    if (in_flight[i] == me.block)
      fail(std::string(verb(kind)) + " of " + element(array.name, byte) +
               ", which an asynchronous copy is still to write",
           place.site, place.pc);
    if (kind != Access::kWrite && cell.writes.latest.block != me.block)
      fail("uninitialised: " + std::string(verb(kind)) + " of " + element(array.name, byte), place.site, place.pc);
    check_races(cell, attempt, byte);
    record(cell, kind, me, number);
  }
}

size_t shared_offset(const void* p) { return static_cast<size_t>(static_cast<const char*>(p) - shared_begin()); }

// ---- global memory

[[noreturn]] void fail_outside(uintptr_t address, size_t bytes, Access kind, const Place& place) {
  std::string near = "no region is known";
  uintptr_t nearest = UINTPTR_MAX;
  for (const auto& [region, cells] : regions) {
    const uintptr_t end = region.begin + region.bytes;
    const uintptr_t distance = address < region.begin ? region.begin - address : address < end ? 0 : address - end;
    if (distance >= nearest) continue;
    nearest = distance;
    near = address < region.begin ? std::to_string(distance) + " bytes before " + region.name
                                  : "at byte " + std::to_string(address - region.begin) + " of " + region.name +
                                        ", which has " + std::to_string(region.bytes);
  }
  fail(
      std::string("out of bounds: ") + verb(kind) + " of " + std::to_string(bytes) + " bytes of global memory, " + near,
      place.site, place.pc);
}

void access_global(CheckedRegion& checked, uintptr_t address, size_t bytes, Access kind, const Running& me,
                   const Place& place) {
  const Region& region = checked.region;
  const size_t offset = address - region.begin;
  if (kind != Access::kRead && region.permission == Permission::kRead)
    fail(std::string(verb(kind)) + " of " + element(region.name, offset) + ", which may only be read", place.site,
         place.pc);
  const bool same_value = region.permission == Permission::kFlag && kind == Access::kWrite;
  const Attempt attempt{kind, me, place, region.name, first_block};
  const uint32_t number = number_of(place);
  for (size_t i = offset; i < offset + bytes; ++i) {
    if (!same_value) check_races(checked.cells[i], attempt, i);
    record(checked.cells[i], kind, me, number);
  }
}

CheckedRegion* region_of(uintptr_t address, size_t bytes) {
  for (CheckedRegion& checked : regions) {
    const uintptr_t offset = address - checked.region.begin;
    if (offset < checked.region.bytes && bytes <= checked.region.bytes - offset) return &checked;
  }
  return nullptr;
}

bool in_library(uintptr_t address) {
  return address >= reinterpret_cast<uintptr_t>(__ehdr_start) && address < reinterpret_cast<uintptr_t>(_end);
}

void check(const void* p, size_t bytes, Access kind, const Place& place) {
  const Running* me = running();
  const auto address = reinterpret_cast<uintptr_t>(p);
  if (me == nullptr || bytes == 0 || is_emulators_own(address)) return;
  if (p >= shared_begin() && p < shared_end()) return access_shared(shared_offset(p), bytes, kind, *me, place);
  if (CheckedRegion* region = region_of(address, bytes))
    return access_global(*region, address, bytes, kind, *me, place);
  if (kind == Access::kRead && in_library(address)) return;  // a constant
  fail_outside(address, bytes, kind, place);
}

}  // namespace

// ---- what the emulator calls

void add_region(const Region& region) { regions.push_back({region, make_cells(region.bytes)}); }

void clear_regions() { regions.clear(); }

void add_shared_array(const SharedArray& array) {
  shared_arrays.push_back(array);
  std::sort(shared_arrays.begin(), shared_arrays.end(),
            [](const SharedArray& a, const SharedArray& b) { return a.offset < b.offset; });
}

void begin_launch(uint32_t next_block) {
  first_block = next_block;
  if (shared_cells != nullptr) return;
  const auto bytes = static_cast<size_t>(shared_end() - shared_begin());
  shared_cells = make_cells(bytes);
  in_flight.assign(bytes, 0);
}

void begin_block(unsigned threads) {
  const unsigned lanes = (threads + kWarp - 1) / kWarp * kWarp;
  clocks.assign(lanes, 1);
  at_barrier.assign(lanes, 0);
  seen.assign(size_t{lanes} * kWarp, 0);
}

void synchronize_block() {
  at_barrier = clocks;
  for (size_t thread = 0; thread < clocks.size(); ++thread)
    std::copy_n(&clocks[thread / kWarp * kWarp], kWarp, &seen[thread * kWarp]);
  for (uint32_t& clock : clocks) ++clock;
}

void synchronize_lanes(unsigned warp, unsigned mask) {
  uint32_t known[kWarp] = {};
  uint32_t* of_warp = &clocks[warp * kWarp];
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    const uint32_t* by_lane = &seen[(warp * kWarp + lane) * kWarp];
    for (unsigned other = 0; other < kWarp; ++other) known[other] = std::max(known[other], by_lane[other]);
    known[lane] = of_warp[lane];
  }
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    std::copy_n(known, kWarp, &seen[(warp * kWarp + lane) * kWarp]);
    ++of_warp[lane];
  }
}

void access(const void* p, size_t bytes, Access kind, Site site) { check(p, bytes, kind, {site, nullptr}); }

// The copy may land at once, so that it must not race with what came before; what comes until it has landed is refused.
void begin_copy(const void* to_shared, size_t bytes, Site site) {
  const Running& me = *running();
  const Place place{site, nullptr};
  const size_t offset = shared_offset(to_shared);
  const SharedArray& array = array_at(offset, bytes, Access::kWrite, place);
  const Attempt attempt{Access::kWrite, me, place, array.name, me.block};
  for (size_t i = offset; i < offset + bytes; ++i) {
    if (in_flight[i] == me.block) fail("a second asynchronous copy to " + element(array.name, i - array.offset), site);
    check_races(shared_cells[i], attempt, i - array.offset);
    in_flight[i] = me.block;
  }
}

void end_copy(const void* to_shared, size_t bytes, Site site) {
  const size_t offset = shared_offset(to_shared);
  std::fill_n(in_flight.begin() + static_cast<std::ptrdiff_t>(offset), bytes, 0);
  access(to_shared, bytes, Access::kWrite, site);
}

bool is_writable(const void* p, size_t bytes) {
  const CheckedRegion* region = region_of(reinterpret_cast<uintptr_t>(p), bytes);
  return bytes == 0 || (region != nullptr && region->region.permission != Permission::kRead);
}

}  // namespace engram::emulator::checker

// ---- what instrumented code calls

namespace checker = engram::emulator::checker;
using checker::Access;
using engram::emulator::Site;

#define ENGRAM_RETURN_PLACE {{nullptr, 0}, __builtin_return_address(0)}
#define ENGRAM_HOOK(name, bytes, kind) \
  void name(const void* p) { checker::check(p, bytes, Access::kind, ENGRAM_RETURN_PLACE); }
#define ENGRAM_HOOKS(bytes)                               \
  ENGRAM_HOOK(__tsan_read##bytes, bytes, kRead)           \
  ENGRAM_HOOK(__tsan_write##bytes, bytes, kWrite)         \
  ENGRAM_HOOK(__tsan_unaligned_read##bytes, bytes, kRead) \
  ENGRAM_HOOK(__tsan_unaligned_write##bytes, bytes, kWrite)

extern "C" {

ENGRAM_HOOKS(1)
ENGRAM_HOOKS(2)
ENGRAM_HOOKS(4)
ENGRAM_HOOKS(8)
ENGRAM_HOOKS(16)

void __tsan_read_range(const void* p, size_t bytes) { checker::check(p, bytes, Access::kRead, ENGRAM_RETURN_PLACE); }
void __tsan_write_range(const void* p, size_t bytes) { checker::check(p, bytes, Access::kWrite, ENGRAM_RETURN_PLACE); }
void __tsan_init() {}

// Calls of the C library, which are not instrumented: build.py renames those in kernels.
void* checked_memcpy(void* to, const void* from, size_t bytes) {
  checker::check(from, bytes, Access::kRead, ENGRAM_RETURN_PLACE);
  checker::check(to, bytes, Access::kWrite, ENGRAM_RETURN_PLACE);
  return memcpy(to, from, bytes);
}
void* checked_memmove(void* to, const void* from, size_t bytes) {
  checker::check(from, bytes, Access::kRead, ENGRAM_RETURN_PLACE);
  checker::check(to, bytes, Access::kWrite, ENGRAM_RETURN_PLACE);
  return memmove(to, from, bytes);
}
void* checked_memset(void* to, int value, size_t bytes) {
  checker::check(to, bytes, Access::kWrite, ENGRAM_RETURN_PLACE);
  return memset(to, value, bytes);
}

// The data of every kind of undefined behaviour begin with its place in the source.
struct SourceLocation {
  const char* file;
  uint32_t line, column;
};

struct MisalignedAccess {
  SourceLocation location;
  const void* type;
  unsigned char log_alignment, kind;
};

static void undefined(const SourceLocation* location, const std::string& what) {
  engram::emulator::fail_anywhere(what, Site{location->file, static_cast<int>(location->line)});
}

void __ubsan_handle_type_mismatch_v1(const MisalignedAccess* data, uintptr_t address) {
  const unsigned alignment = 1u << data->log_alignment;
  undefined(&data->location, "misaligned: an address that is " + std::to_string(address % alignment) +
                                 " beyond a multiple of " + std::to_string(alignment) + " bytes");
}
void __ubsan_handle_out_of_bounds(const SourceLocation* location, uintptr_t index) {
  undefined(location, "out of bounds: index " + std::to_string(static_cast<intptr_t>(index)) + " of an array");
}
void __ubsan_handle_shift_out_of_bounds(const SourceLocation* location, uintptr_t, uintptr_t by) {
  undefined(location, "undefined: a shift by " + std::to_string(static_cast<intptr_t>(by)));
}
void __ubsan_handle_divrem_overflow(const SourceLocation* location, uintptr_t, uintptr_t) {
  undefined(location, "undefined: a division by zero or with overflow");
}
#define ENGRAM_OVERFLOW(name, operation)                               \
  void name(const SourceLocation* location, uintptr_t, uintptr_t) {    \
    undefined(location, "undefined: signed overflow of a " operation); \
  }
ENGRAM_OVERFLOW(__ubsan_handle_add_overflow, "sum")
ENGRAM_OVERFLOW(__ubsan_handle_sub_overflow, "difference")
ENGRAM_OVERFLOW(__ubsan_handle_mul_overflow, "product")
ENGRAM_OVERFLOW(__ubsan_handle_negate_overflow, "negation")

}  // extern "C"
