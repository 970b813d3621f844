// Threads over the crystals of a batch.
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

// Call body(b) once for each b in [0, count) on up to `threads` threads, the calling one among them, but
// no more than there are crystals or cores. std::system_error if the system refuses a thread.
// An exception ends the work and is rethrown; if several crystals fail it is that of the lowest index:
// indices are handed out in order, so every lower one was already under way and is finished.
template <class Body>
void for_each_crystal(std::int64_t count, int threads, const Body& body) {
  std::atomic<std::int64_t> next{0};
  std::atomic<bool> failed{false};
  std::mutex mutex;
  std::int64_t failed_index = count;
  std::exception_ptr failure;
  const auto work = [&] {
    for (std::int64_t b; !failed && (b = next++) < count;) {
      try {
        body(b);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex);
        failed = true;
        if (b < failed_index) {
          failed_index = b;
          failure = std::current_exception();
        }
      }
    }
  };
  const std::int64_t cores = std::max(1u, std::thread::hardware_concurrency());  // 0 where unknown
  const std::int64_t pool_size = std::min({static_cast<std::int64_t>(threads), count, cores}) - 1;
  {
    ThreadPool pool;
    try {
      for (std::int64_t t = 0; t < pool_size; ++t) pool.threads.emplace_back(work);
    } catch (...) {
      failed = true;  // the threads that did start take no further crystal
      throw;
    }
    work();
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace mgt
