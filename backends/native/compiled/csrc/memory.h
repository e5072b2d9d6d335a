// Memory of results, kept for the next call.
//
// The C library returns large blocks to the system when they are freed, and the next call has to get new pages. Writing
// a new page costs a tenth or more of the time of the product that fills it.

#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <new>

namespace fxquant {

class Pool {
 public:
  static Pool& instance() {
    static Pool* pool = new Pool;  // Never destroyed, because tensors may outlive static objects.
    return *pool;
  }

  // Returns a block of at least `bytes` bytes, and not much more.
  std::pair<void*, size_t> take(size_t bytes) {
    bytes = (bytes + kGrain - 1) / kGrain * kGrain;
    {
      const std::lock_guard<std::mutex> guard(mutex_);
      const auto found = free_.lower_bound(bytes);
      if (found != free_.end() && found->first <= bytes + bytes / 8) {
        const std::pair<void*, size_t> block{found->second, found->first};
        held_ -= found->first;
        free_.erase(found);
        return block;
      }
    }
    void* block = std::aligned_alloc(kGrain, bytes);
    if (block == nullptr) {
      clear();
      block = std::aligned_alloc(kGrain, bytes);
    }
    if (block == nullptr) throw std::bad_alloc();
    return {block, bytes};
  }

  void give(void* block, size_t bytes) {
    const std::lock_guard<std::mutex> guard(mutex_);
    // Calls with changing shapes leave blocks that fit no later call. The smallest blocks are freed first.
    while (held_ + bytes > kMost && !free_.empty()) release(free_.begin());
    if (bytes > kMost) return std::free(block);
    free_.emplace(bytes, block);
    held_ += bytes;
  }

  void clear() {
    const std::lock_guard<std::mutex> guard(mutex_);
    while (!free_.empty()) release(free_.begin());
  }

 private:
  static constexpr size_t kGrain = 4096;
  static constexpr size_t kMost = size_t{256} << 20;

  void release(std::multimap<size_t, void*>::iterator block) {
    held_ -= block->first;
    std::free(block->second);
    free_.erase(block);
  }

  std::mutex mutex_;
  std::multimap<size_t, void*> free_;
  size_t held_ = 0;
};

// An uninitialized contiguous tensor.
inline at::Tensor pooled(at::IntArrayRef sizes, const at::TensorOptions& options) {
  size_t bytes = options.dtype().itemsize();
  for (const int64_t size : sizes) bytes *= size;
  if (bytes < (size_t{128} << 10)) return at::empty(sizes, options);  // The C library keeps blocks of this size itself.
  const auto [block, size] = Pool::instance().take(bytes);
  return at::from_blob(block, sizes, [size = size](void* data) { Pool::instance().give(data, size); }, options);
}

}  // namespace fxquant
