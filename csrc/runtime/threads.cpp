#include "runtime/threads.h"

#include <algorithm>

#include "core/bits.h"

namespace engram::runtime {
namespace {

thread_local Pool* current_pool = nullptr;  // Runtime::parallel_for has no owner

}  // namespace

Pool::Pool(int threads) {
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { wait_for_work(i); });
}

Pool::~Pool() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stops_ = true;
  }
  begins_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void Pool::wait_for_work(int64_t number) {
  uint64_t seen = 0;
  while (true) {
    Work work;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      begins_.wait(lock, [&] { return stops_ || round_ != seen; });
      if (stops_) return;
      seen = round_;
      work = work_;
    }
    if (number < work.shares)
      work.body(work.count * number / work.shares, work.count * (number + 1) / work.shares, work.context);
    const std::lock_guard<std::mutex> lock(mutex_);
    if (--running_ == 0) ends_.notify_one();
  }
}

void Pool::parallel_for(int64_t count, int64_t grain, cpu::Runtime::Body body, void* context) {
  const int64_t shares = std::min<int64_t>(threads(), ceil_div(count, std::max<int64_t>(1, grain)));
  std::unique_lock<std::mutex> caller(caller_, std::defer_lock);
  if (shares <= 1 || !caller.try_lock()) {
    body(0, count, context);
    return;
  }
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    work_ = {body, context, count, shares};
    running_ = static_cast<int64_t>(workers_.size());
    ++round_;
  }
  begins_.notify_all();
  body(0, count / shares, context);
  std::unique_lock<std::mutex> lock(mutex_);
  ends_.wait(lock, [&] { return running_ == 0; });
}

cpu::Runtime runtime_of(Pool& pool, Workspace& workspace) {
  current_pool = &pool;
  return {[](int64_t count, int64_t grain, cpu::Runtime::Body body, void* context) {
            current_pool->parallel_for(count, grain, body, context);
          },
          [](void* owner, size_t bytes) { return static_cast<Workspace*>(owner)->allocate(bytes); }, &workspace,
          pool.threads()};
}

}  // namespace engram::runtime
