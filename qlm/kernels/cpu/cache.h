// Keys and values of sequences, in pages of PAGE positions that forks share until they differ.
//
// One page holds its positions for all layers, layer after layer; kernels.h (CacheView) says how a layer's part is laid
// out. A page is shared by reference count and copied when a sequence that does not own it alone appends to it, which
// can only be the last, partly filled one. Whatever lies at or past a sequence's length is finite, so that a kernel may
// multiply it by zero.
//
// A pool belongs to its decoder and to every cache made from it, whichever lives longest: a cache outlives its decoder
// safely, and can then be asked for its length, forked, truncated and destroyed. All functions here expect the caller
// to hold the pool's mutex.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "kernels.h"

namespace qlm {

struct Page {
  int64_t references;
  char *data;  // aligned to 64
  void *allocation;
};

class PagePool {
 public:
  PagePool(int64_t layers, int64_t kv_heads, int64_t head_dim, int32_t dtype);

  Page *take();                                          // zeros; throws std::bad_alloc
  Page *take_copy(const Page &page, int64_t positions);  // its first positions, then zeros; throws std::bad_alloc
  void share(Page *page) { ++page->references; }
  void release(Page *page);
  void clear(Page *page, int64_t from) const;  // zeros from position `from` of the page on

  void *layer(const Page &page, int64_t layer) const { return page.data + layer * layer_bytes_; }
  int64_t bytes() const { return pages_ * page_bytes_; }
  int64_t layers() const { return layers_; }
  int64_t kv_heads() const { return kv_heads_; }
  int64_t head_dim() const { return head_dim_; }
  int32_t dtype() const { return dtype_; }

  std::mutex mutex;

 private:
  int64_t layers_, kv_heads_, head_dim_;
  int32_t dtype_;
  int64_t element_bytes_, head_bytes_, layer_bytes_, page_bytes_;
  int64_t pages_ = 0;
};

}  // namespace qlm

struct qlm_cache {
  explicit qlm_cache(std::shared_ptr<qlm::PagePool> pool) : pool(std::move(pool)) {}
  ~qlm_cache() { forget(0); }
  qlm_cache(const qlm_cache &) = delete;
  qlm_cache &operator=(const qlm_cache &) = delete;

  // Room for positions up to `length`, the pages that will be written owned by this cache alone. Throws std::bad_alloc;
  // the sequence is then what it was.
  void reserve(int64_t length);
  // Forget all positions from `to` on, and pages that hold no position any more. With `wipe` what was there becomes
  // zero.
  void forget(int64_t to, bool wipe = false);
  // A second cache with the same positions.
  std::unique_ptr<qlm_cache> fork() const;

  qlm::CacheView view(int64_t layer) const {
    return {addresses.data() + layer * capacity, pool->dtype(), pool->kv_heads(), pool->head_dim()};
  }

  std::shared_ptr<qlm::PagePool> pool;
  int64_t length = 0;
  std::vector<qlm::Page *> pages;

 private:
  void grow(int64_t pages);
  void set(int64_t index, qlm::Page *page);

  int64_t capacity = 0;           // pages that `addresses` has room for
  std::vector<void *> addresses;  // [L, capacity]: each layer's part of each page, for CacheView
};
