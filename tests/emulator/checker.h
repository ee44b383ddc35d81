// What emulator.cpp tells the checker (checker.cpp), which the fast build leaves out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "emulated_cuda.h"

namespace engram::emulator {

// How kernels may use a region of global memory.
enum class Permission : int {
  kRead,
  kWrite,  // and read
  kFlag,   // threads and blocks may write it at the same time, as they do with the same value
};

// Global memory that kernels may touch.
struct Region {
  uintptr_t begin;
  size_t bytes;
  std::string name;
  Permission permission;
};

// A shared array, by its offset in the memory of all shared arrays of the library.
struct SharedArray {
  size_t offset, bytes;
  std::string name;
};

// The thread that runs. Its number in the block, and which block of all since the library was loaded, from 1.
struct Running {
  unsigned thread, warp;
  uint32_t block;
};

const Running* running();  // null while the host runs
const char* shared_begin();
const char* shared_end();
bool is_emulators_own(uintptr_t address);  // stacks of threads, arguments of the kernel

// ", at FILE:LINE" for a message; of an address in the kernel's code where there is no site, and nothing if neither.
std::string where(Site site, const void* pc = nullptr);

// Ends the launch with an error that names kernel, block and thread. Never returns to the thread. On the host, which
// has to go on, it only makes the error known, and returns.
void fail_anywhere(const std::string& what, Site site, const void* pc = nullptr);
[[noreturn]] void fail(const std::string& what, Site site, const void* pc = nullptr);

namespace checker {

enum class Access { kRead, kWrite, kAtomic };

#if ENGRAM_CHECKED
void add_region(const Region& region);
void clear_regions();
void add_shared_array(const SharedArray& array);
void begin_launch(uint32_t next_block);
void begin_block(unsigned threads);
void synchronize_block();
void synchronize_lanes(unsigned warp, unsigned mask);
void access(const void* p, size_t bytes, Access kind, Site site);
void begin_copy(const void* to_shared, size_t bytes, Site site);
void end_copy(const void* to_shared, size_t bytes, Site site);
bool is_writable(const void* p, size_t bytes);  // by the host
#else
inline void add_region(const Region&) {}
inline void clear_regions() {}
inline void add_shared_array(const SharedArray&) {}
inline void begin_launch(uint32_t) {}
inline void begin_block(unsigned) {}
inline void synchronize_block() {}
inline void synchronize_lanes(unsigned, unsigned) {}
inline void access(const void*, size_t, Access, Site) {}
inline void begin_copy(const void*, size_t, Site) {}
inline void end_copy(const void*, size_t, Site) {}
inline bool is_writable(const void*, size_t) { return true; }
#endif

}  // namespace checker
}  // namespace engram::emulator
