#include "cache.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

namespace qlm {

namespace {

constexpr int64_t ALIGNMENT = 64;

int64_t dtype_bytes(int32_t dtype) { return dtype == QLM_F32 ? 4 : dtype == QLM_I8 ? 1 : 2; }

}  // namespace

PagePool::PagePool(int64_t layers, int64_t kv_heads, int64_t head_dim, int32_t dtype)
    : layers_(layers), kv_heads_(kv_heads), head_dim_(head_dim), dtype_(dtype), element_bytes_(dtype_bytes(dtype)) {
  // PAGE elements of any dtype are a multiple of 64 bytes, so that every part stays aligned.
  head_bytes_ = 2 * head_dim * PAGE * element_bytes_ + (dtype == QLM_I8 ? 2 * PAGE * int64_t{sizeof(float)} : 0);
  layer_bytes_ = kv_heads * head_bytes_;
  page_bytes_ = layers * layer_bytes_;
}

Page *PagePool::take() {
  auto page = std::make_unique<Page>();
  // calloc, because the system's fresh memory is zero already.
  page->allocation = std::calloc(1, static_cast<size_t>(page_bytes_ + ALIGNMENT));
  if (page->allocation == nullptr) throw std::bad_alloc();
  const auto address = reinterpret_cast<uintptr_t>(page->allocation);
  page->data = static_cast<char *>(page->allocation) + (ALIGNMENT - address % ALIGNMENT) % ALIGNMENT;
  page->references = 1;
  ++pages_;
  return page.release();
}

Page *PagePool::take_copy(const Page &page, int64_t positions) {
  Page *copy = take();
  std::memcpy(copy->data, page.data, static_cast<size_t>(page_bytes_));
  clear(copy, positions);
  return copy;
}

void PagePool::release(Page *page) {
  if (--page->references > 0) return;
  std::free(page->allocation);
  delete page;
  --pages_;
}

void PagePool::clear(Page *page, int64_t from) const {
  const int64_t rest = PAGE - from;
  if (rest <= 0) return;
  for (int64_t part = 0; part < layers_ * kv_heads_; ++part) {
    char *keys = page->data + part * head_bytes_;
    for (int64_t d = 0; d < head_dim_; ++d) {
      std::memset(keys + (d * PAGE + from) * element_bytes_, 0, static_cast<size_t>(rest * element_bytes_));
    }
    char *values = keys + head_dim_ * PAGE * element_bytes_;
    std::memset(values + from * head_dim_ * element_bytes_, 0, static_cast<size_t>(rest * head_dim_ * element_bytes_));
    if (dtype_ == QLM_I8) {
      char *scales = values + head_dim_ * PAGE * element_bytes_;
      for (int64_t which = 0; which < 2; ++which) {
        std::memset(scales + (which * PAGE + from) * int64_t{sizeof(float)}, 0,
                    static_cast<size_t>(rest) * sizeof(float));
      }
    }
  }
}

}  // namespace qlm

void qlm_cache::grow(int64_t wanted) {
  if (wanted <= capacity) return;
  const int64_t room = wanted < 2 * capacity ? 2 * capacity : wanted;
  std::vector<void *> larger(static_cast<size_t>(room * pool->layers()));
  pages.reserve(static_cast<size_t>(room));
  addresses.swap(larger);
  capacity = room;
  for (size_t i = 0; i < pages.size(); ++i) set(static_cast<int64_t>(i), pages[i]);
}

void qlm_cache::set(int64_t index, qlm::Page *page) {
  pages[static_cast<size_t>(index)] = page;
  for (int64_t l = 0; l < pool->layers(); ++l)
    addresses[static_cast<size_t>(l * capacity + index)] = pool->layer(*page, l);
}

void qlm_cache::reserve(int64_t wanted) {
  const int64_t count = (wanted + qlm::PAGE - 1) / qlm::PAGE;
  grow(count);
  const int64_t used = length % qlm::PAGE;
  if (used != 0 && wanted > length && pages.back()->references > 1) {
    qlm::Page *shared = pages.back();
    set(static_cast<int64_t>(pages.size()) - 1, pool->take_copy(*shared, used));
    pool->release(shared);
  }
  const size_t before = pages.size();
  try {
    while (static_cast<int64_t>(pages.size()) < count) {
      qlm::Page *page = pool->take();
      pages.push_back(page);  // `grow` has made room
      set(static_cast<int64_t>(pages.size()) - 1, page);
    }
  } catch (...) {
    while (pages.size() > before) {
      pool->release(pages.back());
      pages.pop_back();
    }
    throw;
  }
}

void qlm_cache::forget(int64_t to, bool wipe) {
  const size_t kept = static_cast<size_t>((to + qlm::PAGE - 1) / qlm::PAGE);
  while (pages.size() > kept) {
    pool->release(pages.back());
    pages.pop_back();
  }
  // A shared page was not written to by this cache.
  if (wipe && to % qlm::PAGE != 0 && pages.back()->references == 1) pool->clear(pages.back(), to % qlm::PAGE);
  if (to < length) length = to;
}

std::unique_ptr<qlm_cache> qlm_cache::fork() const {
  auto copy = std::make_unique<qlm_cache>(pool);
  copy->grow(static_cast<int64_t>(pages.size()));
  for (qlm::Page *page : pages) {
    pool->share(page);
    copy->pages.push_back(page);
    copy->set(static_cast<int64_t>(copy->pages.size()) - 1, page);
  }
  copy->length = length;
  return copy;
}
