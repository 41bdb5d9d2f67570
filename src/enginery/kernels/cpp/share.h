// Dividing tasks over threads: each owns a contiguous range, which it walks forward, and who is done takes tasks from
// the back of others. On a quiet machine that is a static division; where a core is busy with something else, nobody
// waits for it with work undone. Which thread runs a task has no effect on the result.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

namespace enginery {

// Threads that are worth waking for so much work: each costs about two microseconds, and on a busy machine far more.
inline int useful_threads(int threads, double nanoseconds) {
  constexpr double kWorthwhile = 4000.0;
  return nanoseconds < kWorthwhile * threads ? 1 + int(nanoseconds / kWorthwhile) : threads;
}

// Estimates for one core of the kind that these kernels are for; only orders of magnitude matter.
constexpr double kBytesPerNanosecond = 20.0, kOperationsPerNanosecond = 100.0;

class SharedTasks {
 public:
  SharedTasks(int64_t tasks, int threads) : threads_(threads), ranges_(new Range[threads]) {
    for (int64_t thread = 0; thread < threads; ++thread)
      ranges_[thread].bounds = join(tasks * thread / threads, tasks * (thread + 1) / threads);
  }

  // The next task of `thread`, or −1.
  int64_t next(int thread) {
    const int64_t own = take(ranges_[thread].bounds, true);
    if (own >= 0) return own;
    for (int other = 1; other < threads_; ++other) {
      const int64_t task = take(ranges_[(thread + other) % threads_].bounds, false);
      if (task >= 0) return task;
    }
    return -1;
  }

 private:
  struct alignas(64) Range {
    std::atomic<uint64_t> bounds;
  };

  static uint64_t join(int64_t begin, int64_t end) { return uint64_t(begin) << 32 | uint64_t(end); }

  static int64_t take(std::atomic<uint64_t>& bounds, bool front) {
    uint64_t seen = bounds.load(std::memory_order_relaxed);
    for (;;) {
      const int64_t begin = int64_t(seen >> 32), end = int64_t(seen & 0xffffffffu);
      if (begin >= end) return -1;
      const uint64_t left = front ? join(begin + 1, end) : join(begin, end - 1);
      if (bounds.compare_exchange_weak(seen, left, std::memory_order_relaxed)) return front ? begin : end - 1;
    }
  }

  int threads_;
  std::unique_ptr<Range[]> ranges_;
};

}  // namespace enginery
