// Threads over the crystals of a batch, or over the rows of one.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace mgt {

// Threads that are joined when they go out of scope: a joinable one that is destroyed ends the program.
struct ThreadPool {
  std::vector<std::thread> threads;
  ~ThreadPool() {
    for (std::thread& thread : threads) thread.join();
  }
};

// How many threads work when up to `threads` are asked for: no more than there are cores.
inline int worker_count(int threads) {
  static const int cores = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));  // 0: unknown
  return std::min(threads, cores);
}

// Call body(worker, begin, end) for consecutive blocks of [0, count), each of `block` items but the last, on
// up to worker_count(threads) threads, the calling one among them; worker < worker_count(threads) numbers the
// thread. std::system_error if the system refuses a thread.
// An exception ends the work and is rethrown; if several blocks fail it is that of the first: blocks are
// handed out in order, so every earlier one was already under way and is finished.
template <class Body>
void for_each_block(std::int64_t count, std::int64_t block, int threads, const Body& body) {
  const std::int64_t blocks = (count + block - 1) / block;
  const auto workers = static_cast<int>(std::min<std::int64_t>(worker_count(threads), blocks));
  if (workers <= 1) {
    for (std::int64_t begin = 0; begin < count; begin += block)
      body(0, begin, std::min(begin + block, count));
    return;
  }
  std::atomic<std::int64_t> next{0};
  std::atomic<bool> failed{false};
  std::mutex mutex;
  std::int64_t failed_begin = count;
  std::exception_ptr failure;
  const auto work = [&](int worker) {
    for (std::int64_t begin; !failed && (begin = next.fetch_add(block)) < count;) {
      try {
        body(worker, begin, std::min(begin + block, count));
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex);
        failed = true;
        if (begin < failed_begin) {
          failed_begin = begin;
          failure = std::current_exception();
        }
      }
    }
  };
  {
    ThreadPool pool;
    try {
      for (int worker = 1; worker < workers; ++worker) pool.threads.emplace_back(work, worker);
    } catch (...) {
      failed = true;  // the threads that did start take no further block
      throw;
    }
    work(0);
  }
  if (failure) std::rethrow_exception(failure);
}

// Call body(b) once for each b in [0, count); otherwise as for_each_block.
template <class Body>
void for_each_crystal(std::int64_t count, int threads, const Body& body) {
  for_each_block(count, 1, threads, [&](int, std::int64_t b, std::int64_t) { body(b); });
}

}  // namespace mgt
