#include "buffer.hpp"

#include <cstdlib>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mgt {
namespace {

constexpr std::size_t kAlign = 64;
constexpr std::size_t kHugePage = std::size_t{1} << 21;
constexpr std::size_t kMaxKept = std::size_t{1} << 28;  // bytes that wait for use: 256 MiB

std::size_t round_up(std::size_t bytes, std::size_t unit) { return (bytes + unit - 1) / unit * unit; }

void* checked(void* memory) {
  if (!memory) throw std::bad_alloc();
  return memory;
}

// Large blocks given back, for the next call. Never waits for its lock: a process forked while another thread
// held it would wait for ever, and memory can as well come from the system.
class Recycler {
 public:
  void* take(std::size_t bytes, std::size_t& capacity) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    Block* best = nullptr;
    for (Block& block : blocks_) {
      const bool fits = block.capacity >= bytes && block.capacity / 4 <= bytes;
      if (fits && (!best || block.capacity < best->capacity)) best = &block;
    }
    if (!best) {
      // Blocks of sizes no longer asked for must not keep out those that are.
      if (kept_ > kMaxKept / 2) release_all();
      return nullptr;
    }
    void* memory = best->memory;
    capacity = best->capacity;
    kept_ -= capacity;
    *best = {};
    return memory;
  }

  bool give(void* memory, std::size_t capacity) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock || kept_ + capacity > kMaxKept) return false;
    for (Block& block : blocks_) {
      if (block.memory) continue;
      block = {memory, capacity};
      kept_ += capacity;
      return true;
    }
    return false;
  }

 private:
  struct Block {
    void* memory = nullptr;
    std::size_t capacity = 0;
  };
  void release_all() {
    for (Block& block : blocks_) {
      std::free(block.memory);
      block = {};
    }
    kept_ = 0;
  }

  std::mutex mutex_;
  Block blocks_[64];
  std::size_t kept_ = 0;
};

Recycler& recycler() {
  static Recycler* const instance = new Recycler;  // outlives every array, whenever that is released
  return *instance;
}

}  // namespace

void* take_memory(std::size_t bytes, std::size_t& capacity) {
  if (bytes < kLarge) {
    capacity = bytes;
    return checked(std::malloc(bytes));
  }
  if (void* memory = recycler().take(bytes, capacity)) return memory;
  const std::size_t page = bytes < kHugePage ? kAlign : kHugePage;
  capacity = round_up(bytes, page);
  void* memory = checked(std::aligned_alloc(page, capacity));
#if defined(MADV_HUGEPAGE)
  if (page == kHugePage) madvise(memory, capacity, MADV_HUGEPAGE);  // advice: no matter if not taken
#endif
  return memory;
}

void give_memory(void* memory, std::size_t capacity) noexcept {
  if (capacity < kLarge || !recycler().give(memory, capacity)) std::free(memory);
}

}  // namespace mgt
