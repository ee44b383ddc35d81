// Threads for the kernels, without torch.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "cpu/launch.h"
#include "runtime/workspace.h"

namespace engram::runtime {

// Threads that wait for work. One call at a time has them; the work of a second is done by its own thread.
class Pool {
 public:
  explicit Pool(int threads);  // the caller among them
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }
  void parallel_for(int64_t count, int64_t grain, cpu::Runtime::Body body, void* context);

 private:
  struct Work {
    cpu::Runtime::Body body;
    void* context;
    int64_t count, shares;
  };
  void wait_for_work(int64_t number);

  std::mutex caller_;  // held by the call that has the threads
  std::mutex mutex_;
  std::condition_variable begins_, ends_;
  Work work_{};
  uint64_t round_ = 0;  // raised with each piece of work
  int64_t running_ = 0;
  bool stops_ = false;
  std::vector<std::thread> workers_;
};

// What kernels need while `pool` and `workspace` live; for calls from this thread only.
cpu::Runtime runtime_of(Pool& pool, Workspace& workspace);

}  // namespace engram::runtime
