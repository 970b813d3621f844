// Threads over the crystals of a batch.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace mgt {

// Call body(b) once for each b in [0, count) on up to `threads` threads, the calling one among them.
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
  std::vector<std::thread> pool;
  for (std::int64_t t = 1; t < threads && t < count; ++t) pool.emplace_back(work);
  work();
  for (std::thread& thread : pool) thread.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace mgt
