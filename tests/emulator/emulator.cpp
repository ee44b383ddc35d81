// The threads of a block as fibers, their scheduler, and what they do together: barriers, warp collectives, matrix
// products, asynchronous copies. README.md describes the model.
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "checker.h"
#include "emulated_ptx.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define ENGRAM_EXPORT extern "C" __attribute__((visibility("default")))

// The first byte of the library, by the linker.
extern "C" __attribute__((visibility("hidden"))) const char __ehdr_start[];

// ---- switching between fibers

#if defined(__x86_64__)

// Saves the registers that a callee keeps on the stack, its address in *save, and takes up the fiber of stack `to`.
extern "C" void engram_switch(void** save, void* to);
asm(R"(
.text
.hidden engram_switch
.globl engram_switch
.type engram_switch, @function
engram_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size engram_switch, .-engram_switch
)");

struct Fiber {
  void* stack_pointer = nullptr;

  void prepare(char* stack, size_t bytes, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + bytes);
    *--top = nullptr;  // where a call would leave its return address: entry() finds the stack aligned as it expects
    *--top = reinterpret_cast<void*>(entry);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    stack_pointer = top;
  }
  static void change(Fiber& from, Fiber& to) { engram_switch(&from.stack_pointer, to.stack_pointer); }
};

#else

struct Fiber {
  ucontext_t context;

  void prepare(char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void change(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }
};

#endif

namespace engram::emulator {
namespace {

constexpr unsigned kWarp = 32, kAllLanes = 0xFFFFFFFFu, kMostThreads = 1024;
constexpr size_t kStackBytes = 128 << 10;
constexpr size_t kCopyBytes = 16;

// ---- state

// An asynchronous copy of 16 bytes.
struct Copy {
  void* to;
  const void* from;
  bool valid;  // zeros are written if not
  unsigned group;
  unsigned char source[kCopyBytes];  // what was there at the start
};

enum class State { kReady, kAtBarrier, kInCollective, kReturned };

struct Thread {
  Fiber fiber;
  uint3 index;
  unsigned number, warp, lane;
  State state;
  Site site;                 // where it waits
  bool predicate;            // of the barrier at which it waits
  std::vector<Copy> copies;  // in flight, oldest first
  unsigned groups;           // of copies, closed
};

// Lanes of a warp that meet to do something together; the last one to arrive does it.
struct Meeting {
  unsigned mask, arrived;
  Site site;
  void* operands[kWarp];
};

// xorshift64*
struct Random {
  uint64_t state;

  uint64_t next() {
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return state * 0x2545F4914F6CDD1Du;
  }
  unsigned below(unsigned bound) { return static_cast<unsigned>((next() >> 32) % bound); }
  template <class T>
  void shuffle(std::vector<T>& items) {
    for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[below(static_cast<unsigned>(i))]);
  }
};

struct Launch {
  const void* kernel;
  void (*thread)(const void*);
  const void* call;
  size_t call_bytes;
  dim3 grid, block;
};

uint64_t schedule = 0;  // 0: natural order; else the seed of an order
int multiprocessors = 4;

std::string error;

// Where the shared arrays of the library lie, with one byte that is always there.
thread_local char shared_anchor;
char *shared_from = nullptr, *shared_to = nullptr;

Launch launched;
uint3 block;
uint32_t blocks_begun = 0;
std::vector<Thread> threads;
std::vector<std::vector<Meeting>> meetings;  // of every warp
int count_at_last_barrier;                   // of predicates
Random dice;

Thread* current = nullptr;
Running current_numbers;
Fiber scheduler;
char* stacks = nullptr;  // of kMostThreads

// ---- errors

std::string text(uint3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

std::string text(Site site) { return std::string(site.file) + ":" + std::to_string(site.line); }

// build.py puts function names and lines in the place of <function OFFSET> and <line OFFSET>.
std::string offset_text(const char* what, const void* address) {
  char buffer[48];
  const auto offset = static_cast<size_t>(static_cast<const char*>(address) - __ehdr_start);
  snprintf(buffer, sizeof buffer, "<%s 0x%zx>", what, offset);
  return buffer;
}

void report(const std::string& what) { error = offset_text("function", launched.kernel) + ", " + what; }

// ---- shared memory

void find_shared_memory() {
  asm volatile("" ::"r"(&shared_anchor));  // memory that is local to a thread is allocated at its first use
  const auto find = [](dl_phdr_info* library, size_t, void*) {
    if (library->dlpi_addr != reinterpret_cast<uintptr_t>(__ehdr_start)) return 0;
    for (int i = 0; i < library->dlpi_phnum; ++i)
      if (library->dlpi_phdr[i].p_type == PT_TLS) {
        shared_from = static_cast<char*>(library->dlpi_tls_data);
        shared_to = shared_from + library->dlpi_phdr[i].p_memsz;
      }
    return 1;
  };
  dl_iterate_phdr(find, nullptr);
}

// ---- fibers

void to_scheduler() { Fiber::change(current->fiber, scheduler); }

void thread_body() {
  launched.thread(launched.call);
  if (!current->copies.empty()) fail("returns with asynchronous copies in flight", {nullptr, 0});
  current->state = State::kReturned;
  to_scheduler();
}

void resume(Thread& thread) {
  current = &thread;
  current_numbers = {thread.number, thread.warp, blocks_begun};
  Fiber::change(scheduler, thread.fiber);
  current = nullptr;
}

void wait(State state, Site site) {
  current->state = state;
  current->site = site;
  to_scheduler();
}

// ---- scheduler

// Lets each thread of a warp that can run do so until it waits. True if one could.
bool run_warp(unsigned warp, std::vector<unsigned>& lanes) {
  if (schedule != 0) dice.shuffle(lanes);
  bool ran = false;
  for (const unsigned lane : lanes) {
    const size_t number = warp * kWarp + lane;
    if (number >= threads.size() || threads[number].state != State::kReady) continue;
    resume(threads[number]);
    if (!error.empty()) return false;
    ran = true;
  }
  return ran;
}

const Thread* first_in(State state) {
  for (const Thread& thread : threads)
    if (thread.state == state) return &thread;
  return nullptr;
}

std::string in_block() { return "block " + text(block) + ": "; }

// With no thread left that can run: opens the barrier if all threads wait at it. False at the end, or after an error.
bool open_barrier() {
  if (const Thread* lane = first_in(State::kInCollective)) {
    char mask[16] = "";
    for (const Meeting& meeting : meetings[lane->warp])
      if (meeting.arrived >> lane->lane & 1) snprintf(mask, sizeof mask, "0x%08x", meeting.mask & ~meeting.arrived);
    report("block " + text(block) + ", thread " + text(lane->index) +
           ": waits for ever for other lanes of its warp, mask " + mask + ", at " + text(lane->site));
    return false;
  }
  const Thread* waiting = first_in(State::kAtBarrier);
  if (waiting == nullptr) return false;
  int count = 0;
  for (const Thread& thread : threads) {
    if (thread.state == State::kReturned) {
      report(in_block() + "a barrier that not all threads reach, at " + text(waiting->site) + ": thread " +
             text(thread.index) + " has returned");
      return false;
    }
    if (thread.site.line != waiting->site.line || strcmp(thread.site.file, waiting->site.file) != 0) {
      report(in_block() + "threads wait at different barriers: " + text(waiting->index) + " at " + text(waiting->site) +
             ", " + text(thread.index) + " at " + text(thread.site));
      return false;
    }
    count += thread.predicate;
  }
  count_at_last_barrier = count;
  for (Thread& thread : threads) thread.state = State::kReady;
  checker::synchronize_block();
  return true;
}

void run_block(std::vector<unsigned>& warps, std::vector<unsigned>& lanes) {
  ++blocks_begun;
  const int poison = schedule == 0 ? 0xCD : static_cast<int>(dice.below(256));
  memset(shared_from, poison, static_cast<size_t>(shared_to - shared_from));
  checker::begin_block(static_cast<unsigned>(threads.size()));
  for (auto& of_warp : meetings) of_warp.clear();
  for (Thread& thread : threads) {
    thread.fiber.prepare(stacks + thread.number * kStackBytes, kStackBytes, thread_body);
    thread.state = State::kReady;
    thread.copies.clear();
    thread.groups = 0;
  }
  // By turns, or one warp as far as it can get before the next one starts: as far apart as a barrier lets them be.
  const bool far_apart = schedule % 2 == 0;
  do {
    if (schedule != 0) dice.shuffle(warps);
    bool ran = true;
    while (ran && error.empty()) {
      ran = false;
      for (const unsigned warp : warps)
        while (run_warp(warp, lanes)) {
          ran = true;
          if (!far_apart) break;
        }
    }
  } while (error.empty() && open_barrier());
}

void check_configuration(dim3 grid, dim3 block_dimensions) {
  const uint64_t count = uint64_t{block_dimensions.x} * block_dimensions.y * block_dimensions.z;
  if (count == 0 || count > kMostThreads || block_dimensions.z > 64)
    report("a block of " + text({block_dimensions.x, block_dimensions.y, block_dimensions.z}) + " threads");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7FFFFFFFu || grid.y > 0xFFFFu || grid.z > 0xFFFFu)
    report("a grid of " + text({grid.x, grid.y, grid.z}) + " blocks");
}

void allocate_stacks() {
  if (stacks != nullptr) return;
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* memory = mmap(nullptr, kMostThreads * kStackBytes, PROT_READ | PROT_WRITE, kFlags, -1, 0);
  if (memory == MAP_FAILED) abort();
  stacks = static_cast<char*>(memory);
}

// ---- collectives

std::string lanes_text(unsigned mask) {
  char buffer[16];
  snprintf(buffer, sizeof buffer, "0x%08x", mask);
  return buffer;
}

void check_mask(unsigned mask, Site site) {
  if ((mask >> current->lane & 1) == 0) fail("a lane that is not in its own mask " + lanes_text(mask), site);
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    const size_t number = current->warp * kWarp + lane;
    if ((mask >> lane & 1) != 0 && (number >= threads.size() || threads[number].state == State::kReturned))
      fail("mask " + lanes_text(mask) + " names lane " + std::to_string(lane) + ", which is not there", site);
  }
}

// Where all lanes of a mask meet. The last to arrive calls operation(operands), with those of each lane.
template <class Operand, class Operation>
void meet(unsigned mask, Operand& operand, Site site, Operation operation) {
  check_mask(mask, site);
  std::vector<Meeting>& of_warp = meetings[current->warp];
  auto meeting = std::find_if(of_warp.begin(), of_warp.end(), [=](const Meeting& m) { return m.mask == mask; });
  if (meeting == of_warp.end()) {
    of_warp.push_back({mask, 0, site, {}});
    meeting = of_warp.end() - 1;
  }
  if (meeting->site.line != site.line || strcmp(meeting->site.file, site.file) != 0)
    fail("lanes of a warp are at different collectives: another at " + text(meeting->site), site);
  meeting->operands[current->lane] = &operand;
  meeting->arrived |= 1u << current->lane;
  if (meeting->arrived != mask) return wait(State::kInCollective, site);

  const Meeting complete = *meeting;
  of_warp.erase(meeting);
  Operand* operands[kWarp];
  for (unsigned lane = 0; lane < kWarp; ++lane) operands[lane] = static_cast<Operand*>(complete.operands[lane]);
  operation(operands);
  for (unsigned lane = 0; lane < kWarp; ++lane)
    if ((mask >> lane & 1) != 0) threads[current->warp * kWarp + lane].state = State::kReady;
}

template <class Operation>
void for_lanes(unsigned mask, Operation operation) {
  for (unsigned lane = 0; lane < kWarp; ++lane)
    if ((mask >> lane & 1) != 0) operation(lane);
}

// ---- matrix products

// Registers of one lane for a product of 16 x 8, whose rows of 32 bytes are given by `a` and columns by `b`.
template <class Sum>
struct Fragments {
  Sum* c;
  const uint32_t *a, *b;
};

// c[row][column] = sum(row of a, column of b, c[row][column]), each row and column as eight 32-bit registers.
template <class Sum, class SumOf>
void multiply(Sum (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site, SumOf sum_of) {
  Fragments<Sum> own{c, a, b};
  meet(kAllLanes, own, site, [=](Fragments<Sum>** of_lane) {
    uint32_t rows[16][8], columns[8][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, quad = lane % 4;
      for (int i = 0; i < 4; ++i) rows[group + i % 2 * 8][quad + i / 2 * 4] = of_lane[lane]->a[i];
      for (int i = 0; i < 2; ++i) columns[group][quad + i * 4] = of_lane[lane]->b[i];
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, quad = lane % 4;
      for (int i = 0; i < 4; ++i) {
        Sum& sum = of_lane[lane]->c[i];
        sum = sum_of(rows[group + i / 2 * 8], columns[quad * 2 + i % 2], sum);
      }
    }
  });
}

float from_bfloat16(uint32_t bits) { return __uint_as_float(bits << 16); }

// ---- asynchronous copies

void check_address(const void* p, Site site, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) fail(std::string(what) + " is not aligned to 16 bytes", site);
}

void check_shared_address(const void* p, Site site, const char* what) {
  const char* byte = static_cast<const char*>(p);
  if (byte < shared_begin() || byte + 16 > shared_end()) fail(std::string(what) + " is not in shared memory", site);
  check_address(p, site, what);
}

void write_copy(const Copy& copy) {
  if (copy.valid)
    memcpy(copy.to, copy.from, kCopyBytes);
  else
    memset(copy.to, 0, kCopyBytes);
}

void land(const Copy& copy, Site site) {
  if (copy.valid && memcmp(copy.source, copy.from, kCopyBytes) != 0)
    fail("the source of an asynchronous copy was changed while in flight", site);
  write_copy(copy);
  checker::end_copy(copy.to, kCopyBytes, site);
}

}  // namespace

// ---- what the checker asks

const Running* running() { return current == nullptr ? nullptr : &current_numbers; }

const char* shared_begin() { return shared_from; }
const char* shared_end() { return shared_to; }

bool is_emulators_own(uintptr_t address) {
  const auto within = [=](const void* begin, size_t bytes) {
    return address - reinterpret_cast<uintptr_t>(begin) < bytes;
  };
  return within(stacks, kMostThreads * kStackBytes) || within(launched.call, launched.call_bytes);
}

std::string where(Site site, const void* pc) {
  if (site.file != nullptr) return ", at " + text(site);
  return pc == nullptr ? "" : ", at " + offset_text("line", pc);
}

void fail_anywhere(const std::string& what, Site site, const void* pc) {
  if (current != nullptr) fail(what, site, pc);
  if (error.empty()) error = "launcher: " + what + where(site, pc);
}

void fail(const std::string& what, Site site, const void* pc) {
  report("block " + text(block) + ", thread " + text(current->index) + ": " + what + where(site, pc));
  for (;;) to_scheduler();
}

// ---- what kernels call

uint3 thread_index() { return current->index; }
uint3 block_index() { return block; }
dim3 block_dimensions() { return launched.block; }
dim3 grid_dimensions() { return launched.grid; }

int count_at_barrier(bool predicate, Site site) {
  current->predicate = predicate;
  wait(State::kAtBarrier, site);
  return count_at_last_barrier;
}

void synchronize_warp(unsigned mask, Site site) {
  const unsigned warp = current->warp;
  int nothing = 0;
  meet(mask, nothing, site, [=](int**) { checker::synchronize_lanes(warp, mask); });
}

uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t bits, unsigned argument, int width, Site site) {
  struct Operand {
    uint64_t given, got;
    unsigned from;
  };
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) fail("a shuffle of width " + std::to_string(width), site);
  const unsigned lane = current->lane, first = lane & ~static_cast<unsigned>(width - 1), end = first + width;
  unsigned from = lane;
  switch (kind) {
    case Shuffle::kFrom:
      from = first + (argument & static_cast<unsigned>(width - 1));
      break;
    case Shuffle::kUp:
      if (argument <= lane - first) from = lane - argument;
      break;
    case Shuffle::kDown:
      if (argument < end - lane) from = lane + argument;
      break;
    case Shuffle::kXor:
      if ((lane ^ argument) < end) from = lane ^ argument;
      break;
  }
  if ((mask >> from & 1) == 0)
    fail("a shuffle from lane " + std::to_string(from) + ", which is not in mask " + lanes_text(mask), site);
  Operand own{bits, 0, from};
  meet(mask, own, site, [=](Operand** of_lane) {
    for_lanes(mask, [=](unsigned l) { of_lane[l]->got = of_lane[of_lane[l]->from]->given; });
  });
  return own.got;
}

unsigned ballot(unsigned mask, bool predicate, Site site) {
  struct Operand {
    bool predicate;
    unsigned votes;
  } own{predicate, 0};
  meet(mask, own, site, [=](Operand** of_lane) {
    unsigned votes = 0;
    for_lanes(mask, [&](unsigned l) { votes |= static_cast<unsigned>(of_lane[l]->predicate) << l; });
    for_lanes(mask, [&](unsigned l) { of_lane[l]->votes = votes; });
  });
  return own.votes;
}

int64_t reduce(Reduction kind, unsigned mask, int64_t value, Site site) {
  const auto combine = [kind](int64_t a, int64_t b) {
    switch (kind) {
      case Reduction::kAdd:
        return a + b;
      case Reduction::kMin:
        return std::min(a, b);
      case Reduction::kMax:
        return std::max(a, b);
      case Reduction::kAnd:
        return a & b;
      case Reduction::kOr:
        return a | b;
      case Reduction::kXor:
        return a ^ b;
    }
    abort();
  };
  int64_t own = value;
  meet(mask, own, site, [=](int64_t** of_lane) {
    bool first = true;
    int64_t result = 0;
    for_lanes(mask, [&](unsigned l) {
      result = first ? *of_lane[l] : combine(result, *of_lane[l]);
      first = false;
    });
    for_lanes(mask, [&](unsigned l) { *of_lane[l] = result; });
  });
  return own;
}

void begin_atomic(const void* p, size_t bytes, Site site) { checker::access(p, bytes, checker::Access::kAtomic, site); }

void copy_asynchronously(void* to, const void* from, bool valid, Site site) {
  check_shared_address(to, site, "the target of an asynchronous copy");
  check_address(from, site, "the source of an asynchronous copy");
  if (valid) checker::access(from, kCopyBytes, checker::Access::kRead, site);
  checker::begin_copy(to, kCopyBytes, site);
  Copy copy{to, from, valid, current->groups, {}};
  if (valid) memcpy(copy.source, from, kCopyBytes);
  current->copies.push_back(copy);
  if (schedule != 0 && dice.below(2) == 0) write_copy(copy);
}

void copy_at_once(void* to, const void* from, bool valid, Site site) {
  check_shared_address(to, site, "the target of a copy");
  check_address(from, site, "the source of a copy");
  if (valid) checker::access(from, kCopyBytes, checker::Access::kRead, site);
  checker::access(to, kCopyBytes, checker::Access::kWrite, site);
  write_copy({to, from, valid, 0, {}});
}

void commit_copies() { ++current->groups; }

void wait_for_copies(unsigned groups_left, Site site) {
  std::vector<Copy>& copies = current->copies;
  size_t landed = 0;
  while (landed < copies.size() && copies[landed].group + groups_left < current->groups) land(copies[landed++], site);
  copies.erase(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(landed));
}

void load_matrices(uint32_t (&r)[4], const void* row, bool transposed, Site site) {
  struct Operand {
    uint32_t* r;
    const void* row;
  } own{r, row};
  check_shared_address(row, site, "a row of a matrix");
  checker::access(row, 16, checker::Access::kRead, site);
  meet(kAllLanes, own, site, [=](Operand** of_lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t elements[8][8];
      for (int i = 0; i < 8; ++i) memcpy(elements[i], of_lane[8 * matrix + i]->row, sizeof elements[i]);
      for (int lane = 0; lane < 32; ++lane) {
        const int group = lane / 4, quad = lane % 4;
        const uint32_t low = transposed ? elements[2 * quad][group] : elements[group][2 * quad];
        const uint32_t high = transposed ? elements[2 * quad + 1][group] : elements[group][2 * quad + 1];
        of_lane[lane]->r[matrix] = low | high << 16;
      }
    }
  });
}

void mma_xor(int32_t& c0, int32_t& c1, uint32_t a, uint32_t b, Site site) {
  struct Operand {
    int32_t* c[2];
    uint32_t a, b;
  } own{{&c0, &c1}, a, b};
  meet(kAllLanes, own, site, [](Operand** of_lane) {
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 2; ++i) {
        const int row = lane / 4, column = lane % 4 * 2 + i;
        for (int quad = 0; quad < 4; ++quad)
          *of_lane[lane]->c[i] += __popc(of_lane[row * 4 + quad]->a ^ of_lane[column * 4 + quad]->b);
      }
  });
}

void mma_and(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site) {
  multiply(c, a, b, site, [](const uint32_t* row, const uint32_t* column, int32_t sum) {
    for (int i = 0; i < 8; ++i) sum += __popc(row[i] & column[i]);
    return sum;
  });
}

void mma_bytes(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site) {
  multiply(c, a, b, site, [](const uint32_t* row, const uint32_t* column, int32_t sum) {
    for (int i = 0; i < 32; ++i) {
      const auto from_a = static_cast<uint8_t>(row[i / 4] >> (i % 4 * 8));
      const auto from_b = static_cast<int8_t>(column[i / 4] >> (i % 4 * 8));
      sum += from_a * from_b;
    }
    return sum;
  });
}

void mma_bfloat16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site) {
  multiply(c, a, b, site, [](const uint32_t* row, const uint32_t* column, float sum) {
    for (int i = 0; i < 16; ++i)
      sum += from_bfloat16(row[i / 2] >> (i % 2 * 16)) * from_bfloat16(column[i / 2] >> (i % 2 * 16));
    return sum;
  });
}

// ---- what launchers call

void run(const void* kernel, dim3 grid, dim3 dimensions, void (*thread)(const void*), const void* call, size_t bytes) {
  if (!error.empty()) return;
  launched = {kernel, thread, call, bytes, grid, dimensions};
  check_configuration(grid, dimensions);
  if (!error.empty()) return;
  allocate_stacks();
  find_shared_memory();
  checker::begin_launch(blocks_begun + 1);
  dice.state = schedule * 0x9E3779B97F4A7C15u + 1;

  const unsigned count = dimensions.x * dimensions.y * dimensions.z, in_grid = grid.x * grid.y * grid.z;
  threads.resize(count);
  for (unsigned i = 0; i < count; ++i) {
    threads[i].index = {i % dimensions.x, i / dimensions.x % dimensions.y, i / dimensions.x / dimensions.y};
    threads[i].number = i, threads[i].warp = i / kWarp, threads[i].lane = i % kWarp;
  }
  std::vector<unsigned> blocks(in_grid), warps((count + kWarp - 1) / kWarp), lanes(kWarp);
  for (auto* items : {&blocks, &warps, &lanes})
    for (size_t i = 0; i < items->size(); ++i) (*items)[i] = static_cast<unsigned>(i);
  meetings.resize(warps.size());
  if (schedule != 0) dice.shuffle(blocks);
  for (const unsigned number : blocks) {
    block = {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
    run_block(warps, lanes);
    if (!error.empty()) return;
  }
}

}  // namespace engram::emulator

using namespace engram::emulator;

cudaError_t cudaGetLastError() { return error.empty() ? cudaSuccess : cudaErrorLaunchFailure; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaGetLastError();
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (attribute != cudaDevAttrMultiProcessorCount || device != 0) return cudaErrorInvalidValue;
  *value = multiprocessors;
  return cudaGetLastError();
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  if (!checker::is_writable(to, bytes)) fail_anywhere("cudaMemsetAsync beyond what may be written", {nullptr, 0});
  if (error.empty()) memset(to, value, bytes);
  return cudaGetLastError();
}

// ---- what build.py calls

ENGRAM_EXPORT const char* emulator_error() { return error.c_str(); }
ENGRAM_EXPORT void emulator_clear_error() { error.clear(); }

ENGRAM_EXPORT void emulator_configure(uint64_t schedule_, int multiprocessors_) {
  schedule = schedule_;
  multiprocessors = multiprocessors_;
}

ENGRAM_EXPORT void emulator_add_region(const void* begin, size_t bytes, const char* name, int permission) {
  checker::add_region({reinterpret_cast<uintptr_t>(begin), bytes, name, static_cast<Permission>(permission)});
}
ENGRAM_EXPORT void emulator_clear_regions() { checker::clear_regions(); }

ENGRAM_EXPORT void emulator_add_shared_array(size_t offset, size_t bytes, const char* name) {
  checker::add_shared_array({offset, bytes, name});
}

#if ENGRAM_COVERAGE
extern "C" void __gcov_dump();
extern "C" void __gcov_reset();
ENGRAM_EXPORT void emulator_write_coverage() {
  __gcov_dump();  // adds to what was written before
  __gcov_reset();
}
#endif
