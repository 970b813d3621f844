// CUDA on the host, one thread block at a time, so that tests run the source of the kernels without a GPU.
//
// Include this before a .cu file. Every CUDA thread is a fiber that runs until it meets a warp-wide operation
// or a barrier; it goes on when all lanes of its warp, or all threads of its block, have come to the same
// one, written in the same line. Every second round runs the threads in reverse, so that a result which
// depends on their order shows. Warp-wide operations take the full mask alone. Atomic operations are plain
// ones: blocks follow one another.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace mgt::emulation {

constexpr int kWarpSize = 32;
constexpr std::size_t kStackSize = 1 << 16;

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

enum class State { kReady, kAtWarp, kAtBlock, kDone };

// What a thread waits at: an operation, and the line that calls it.
struct Site {
  const char* operation = "";
  int line = 0;

  bool operator==(const Site& other) const {
    return line == other.line && !std::strcmp(operation, other.operation);
  }
};

// A context starts a thread on a stack of its own; from then on jumps, which cost no system call, change
// threads.
struct Thread {
  ucontext_t context;
  jmp_buf resume;
  bool started = false;
  std::vector<char> stack = std::vector<char>(kStackSize);
  Dim3 index{0, 0, 0};
  State state = State::kReady;
  Site site;
  std::int64_t warp_operations = 0;
};

// What the lanes of a warp hand to one another. Two sets: a lane may enter the next operation while others
// still read the results of the last.
using Lanes = std::array<std::uint64_t, kWarpSize>;
struct Warp {
  std::array<Lanes, 2> values;
};

class Block {
 public:
  static Block*& current() {
    static Block* block = nullptr;
    return block;
  }

  Block(Dim3 grid_size, unsigned threads)
      : grid_size(grid_size), size{threads}, threads_(threads), warps_(threads / kWarpSize) {
    if (threads == 0 || threads % kWarpSize != 0) throw std::logic_error("a block must be of whole warps");
  }

  void run(Dim3 block_index, const std::function<void()>& body) {
    index = block_index;
    body_ = &body;
    current() = this;
    for (unsigned t = 0; t < threads_.size(); ++t) {
      Thread& thread = threads_[t];
      thread.index = {t, 0, 0};
      thread.state = State::kReady;
      thread.started = false;
      thread.warp_operations = 0;
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.data();
      thread.context.uc_stack.ss_size = thread.stack.size();
      thread.context.uc_link = nullptr;
      makecontext(&thread.context, &Block::enter, 0);
    }
    for (bool reverse = false; step(reverse); reverse = !reverse) release();
    current() = nullptr;
  }

  Thread& thread() { return threads_[running_]; }
  Warp& warp() { return warps_[running_ / kWarpSize]; }

  void wait(State state, Site site) {
    thread().state = state;
    thread().site = site;
    if (_setjmp(thread().resume) == 0) _longjmp(scheduler_, 1);
  }

  Dim3 grid_size, size, index;

 private:
  static void enter() {
    Block& block = *current();
    (*block.body_)();
    block.thread().state = State::kDone;
    _longjmp(block.scheduler_, 1);
  }

  void resume(Thread& thread) {
    if (_setjmp(scheduler_) != 0) return;
    if (thread.started) _longjmp(thread.resume, 1);
    thread.started = true;
    setcontext(&thread.context);
  }

  // Let every thread that can go on do so; false once all have ended.
  bool step(bool reverse) {
    bool alive = false;
    const std::size_t count = threads_.size();
    for (std::size_t n = 0; n < count; ++n) {
      running_ = reverse ? count - 1 - n : n;
      if (thread().state == State::kReady) resume(thread());
      alive |= thread().state != State::kDone;
    }
    return alive;
  }

  // Open the barriers that all have come to.
  void release() {
    bool released = false;
    for (std::size_t w = 0; w < warps_.size(); ++w) {
      Thread* lane = &threads_[w * kWarpSize];
      bool all = true;
      for (int l = 0; l < kWarpSize; ++l) {
        all = all && lane[l].state == State::kAtWarp && lane[l].site == lane[0].site;
      }
      for (int l = 0; all && l < kWarpSize; ++l) lane[l].state = State::kReady;
      released |= all;
    }
    if (released) return;
    const Thread* first = nullptr;
    for (Thread& thread : threads_) {
      if (thread.state == State::kAtWarp) fail(thread, "all lanes of its warp");
      if (thread.state != State::kAtBlock) continue;
      if (!first) first = &thread;
      if (!(thread.site == first->site)) fail(thread, "all threads of its block");
      thread.state = State::kReady;
    }
  }

  [[noreturn]] void fail(const Thread& stuck, const std::string& others) const {
    throw std::logic_error("thread " + std::to_string(stuck.index.x) + " of block " +
                           std::to_string(index.x) + " waits at " + stuck.site.operation + " of line " +
                           std::to_string(stuck.site.line) + ", which not " + others + " have come to");
  }

  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  const std::function<void()>* body_ = nullptr;
  jmp_buf scheduler_;
  std::size_t running_ = 0;
};

// The values of all lanes, after all have given theirs.
inline const Lanes& exchange(Site site, std::uint64_t value) {
  Block& block = *Block::current();
  Thread& thread = block.thread();
  Lanes& values = block.warp().values[thread.warp_operations++ % 2];
  values[thread.index.x % kWarpSize] = value;
  block.wait(State::kAtWarp, site);
  return values;
}

template <class T>
std::uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t));
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <class T>
T from_bits(std::uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline void check_mask(unsigned mask) {
  if (mask != 0xffffffffu) std::abort();  // no exception may leave a fiber
}
inline int lane() { return static_cast<int>(Block::current()->thread().index.x % kWarpSize); }

template <class Kernel>
void launch(unsigned blocks, unsigned threads, const Kernel& kernel) {
  Block block({blocks}, threads);
  const std::function<void()> body = kernel;
  for (unsigned b = 0; b < blocks; ++b) block.run({b, 0, 0}, body);
}

}  // namespace mgt::emulation

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define threadIdx (::mgt::emulation::Block::current()->thread().index)
#define blockIdx (::mgt::emulation::Block::current()->index)
#define blockDim (::mgt::emulation::Block::current()->size)
#define gridDim (::mgt::emulation::Block::current()->grid_size)

// The last parameter of each is the caller's line.
inline void __syncthreads(int line = __builtin_LINE()) {
  ::mgt::emulation::Block::current()->wait(::mgt::emulation::State::kAtBlock, {"__syncthreads", line});
}
inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
  ::mgt::emulation::check_mask(mask);
  ::mgt::emulation::exchange({"__syncwarp", line}, 0);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  ::mgt::emulation::check_mask(mask);
  const auto& votes = ::mgt::emulation::exchange({"__ballot_sync", line}, predicate != 0);
  unsigned result = 0;
  for (int l = 0; l < ::mgt::emulation::kWarpSize; ++l) result |= static_cast<unsigned>(votes[l]) << l;
  return result;
}
inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return __ballot_sync(mask, predicate, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return __ballot_sync(mask, predicate, line) == 0xffffffffu;
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int line = __builtin_LINE()) {
  ::mgt::emulation::check_mask(mask);
  const auto& values = ::mgt::emulation::exchange({"__shfl_sync", line}, ::mgt::emulation::to_bits(value));
  return ::mgt::emulation::from_bits<T>(values[source % ::mgt::emulation::kWarpSize]);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int line = __builtin_LINE()) {
  return __shfl_sync(mask, value, ::mgt::emulation::lane() ^ lanes, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int lanes, int line = __builtin_LINE()) {
  const int lane = ::mgt::emulation::lane();
  return __shfl_sync(mask, value, lane < lanes ? lane : lane - lanes, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int lanes, int line = __builtin_LINE()) {
  const int lane = ::mgt::emulation::lane();
  return __shfl_sync(mask, value, lane + lanes >= ::mgt::emulation::kWarpSize ? lane : lane + lanes, line);
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

template <class T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address = before + value;
  return before;
}
template <class T>
T atomicExch(T* address, T value) {
  const T before = *address;
  *address = value;
  return before;
}
template <class T>
T atomicMin(T* address, T value) {
  const T before = *address;
  if (value < before) *address = value;
  return before;
}
template <class T>
T atomicMax(T* address, T value) {
  const T before = *address;
  if (before < value) *address = value;
  return before;
}
inline double __longlong_as_double(long long bits) { return ::mgt::emulation::from_bits<double>(bits); }
inline long long __double_as_longlong(double value) {
  return static_cast<long long>(::mgt::emulation::to_bits(value));
}
