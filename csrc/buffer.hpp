// Memory that is written before it is read: never zero-filled, and used again from call to call. Fresh pages
// from the system cost an edge list more time than all its arithmetic.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

namespace mgt {

// From so many bytes on blocks are aligned for any vector unit, and kept for use when they are given back;
// the system's allocator keeps smaller ones itself.
constexpr std::size_t kLarge = std::size_t{1} << 16;

// At least `bytes` of memory; sets `capacity` to what there is. std::bad_alloc if there is none.
void* take_memory(std::size_t bytes, std::size_t& capacity);
void give_memory(void* memory, std::size_t capacity) noexcept;

// An array of plain items that owns its memory. New items are not initialised.
template <class T>
class Buffer {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  // Bytes behind the last item that may be read and written, so that whole vector registers can be.
  static constexpr std::size_t kSlack = 64;

  Buffer() = default;
  explicit Buffer(std::size_t size) { resize(size); }
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Buffer() {
    if (data_) give_memory(data_, capacity_);
  }

  // Keeps the items there are.
  void resize(std::size_t size) {
    if (size * sizeof(T) + kSlack > capacity_) {
      std::size_t capacity = 0;
      void* grown = take_memory(size * sizeof(T) + kSlack, capacity);
      if (data_) {
        std::memcpy(grown, static_cast<const void*>(data_), size_ * sizeof(T));
        give_memory(data_, capacity_);
      }
      data_ = static_cast<T*>(grown);
      capacity_ = capacity;
    }
    size_ = size;
  }

  std::size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](std::size_t k) { return data_[k]; }
  const T& operator[](std::size_t k) const { return data_[k]; }
  T* begin() { return data_; }
  T* end() { return data_ + size_; }
  const T* begin() const { return data_; }
  const T* end() const { return data_ + size_; }

 private:
  void swap(Buffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(capacity_, other.capacity_);
  }

  T* data_ = nullptr;
  std::size_t size_ = 0, capacity_ = 0;  // items; bytes
};

// Memory handed out piece by piece, each aligned for any vector unit; pieces stay where they are until all
// are taken back.
class Arena {
 public:
  // Room for `count` items, of which `keep` then says how many are used; what is not kept is handed out
  // again.
  template <class T>
  T* room(std::size_t count) {
    const std::size_t bytes = count * sizeof(T) + Buffer<T>::kSlack;
    while (chunk_ < chunks_.size() && used_ + bytes > chunks_[chunk_].size()) {
      ++chunk_;
      used_ = 0;
    }
    if (chunk_ == chunks_.size()) {  // as large as all before it together, so that there are few
      chunks_.emplace_back(std::max({bytes, kChunk, size_}));
      size_ += chunks_.back().size();
    }
    return reinterpret_cast<T*>(chunks_[chunk_].data() + used_);
  }
  template <class T>
  void keep(std::size_t count) {
    used_ += (count * sizeof(T) + kAlign - 1) / kAlign * kAlign;
  }
  template <class T>
  T* take(std::size_t count) {
    T* items = room<T>(count);
    keep<T>(count);
    return items;
  }
  void clear() { chunk_ = used_ = 0; }

 private:
  static constexpr std::size_t kChunk = std::size_t{1} << 20, kAlign = 64;
  static_assert(kChunk >= kLarge);
  std::vector<Buffer<std::byte>> chunks_;
  std::size_t chunk_ = 0, used_ = 0, size_ = 0;
};

}  // namespace mgt
