// Softmax attention over the pages of a cache, and the store that fills them. All sums are float32.
//
// Scores: lanes are positions. A page's keys are transposed, so that one vector of keys serves every row of queries,
// and tiles of rows x vectors stay in registers while the head dims pass. Output: lanes are head dims, positions pass.
// One element of a result is always the sum over d, then over positions, one after the other: the bits do not depend on
// the tile, nor on what other rows there are. Where a row may not look its weight is +0, and what lies there is finite.
#include "isa.h"
#include "simd_math.h"

namespace qlm {
namespace QLM_ISA {
namespace {

template <int DTYPE> struct Element;
template <> struct Element<QLM_F32> {
  typedef float Type;
  static VF load(const float *p) { return load_f32(p); }
  static VF load_n(const float *p, int64_t n) { return load_f32_n(p, n); }
};
template <> struct Element<QLM_F16> {
  typedef uint16_t Type;
  static VF load(const uint16_t *p) { return load_f16(p); }
  static VF load_n(const uint16_t *p, int64_t n) { return load_float_n(p, 0, QLM_F16, n); }
};
template <> struct Element<QLM_BF16> {
  typedef uint16_t Type;
  static VF load(const uint16_t *p) { return load_bf16(p); }
  static VF load_n(const uint16_t *p, int64_t n) { return load_float_n(p, 0, QLM_BF16, n); }
};
template <> struct Element<QLM_I8> {
  typedef int8_t Type;
  static VF load(const int8_t *p) { return to_f32(load_i8(p)); }
  static VF load_n(const int8_t *p, int64_t n) {
    int8_t whole[W] = {};
    memcpy(whole, p, n);
    return load(whole);
  }
};

// One head's part of a page.
template <int DTYPE> struct HeadPage {
  typedef typename Element<DTYPE>::Type Type;
  Type *keys, *values;               // [D][PAGE], [PAGE][D]
  float *key_scales, *value_scales;  // [PAGE], QLM_I8 only

  HeadPage(const CacheView &cache, int64_t kv_head, int64_t page) {
    const int64_t elements = cache.head_dim * PAGE, scales = DTYPE == QLM_I8 ? PAGE : 0;
    const int64_t bytes = 2 * (elements * static_cast<int64_t>(sizeof(Type)) + scales * 4);
    char *start = static_cast<char *>(cache.pages[page]) + kv_head * bytes;
    keys = reinterpret_cast<Type *>(start);
    values = keys + elements;
    key_scales = reinterpret_cast<float *>(values + elements);
    value_scales = key_scales + scales;
  }
};

// Vectors beside each other in a tile of R rows, `most` at most: the sums, the smaller side's operands and one more fit
// the registers.
constexpr int tile_vectors(int R, int most) {
  int n = most;
  while (n > 1 && R * n + (R < n ? R : n) + 1 > REGISTERS) n /= 2;
  return n;
}
constexpr int MOST_OF_KEYS = PAGE / W < 8 ? PAGE / W : 8;
constexpr int MOST_OF_VALUES = 8;

// sums[r][n] += a[r][i] * b[i][n], i < count: the inner loop of both products. a: float32, a row for each of R; b:
// cached elements, N vectors beside each other, `b_step` elements from one i to the next.
template <int DTYPE, int R, int N>
inline void multiply(const float *const (&a)[R], const typename Element<DTYPE>::Type *b, int64_t b_step, int64_t count,
                     VF (&sums)[R][N]) {
  for (int64_t i = 0; i < count; ++i, b += b_step) {
    if (R < N) {
      VF left[R];
      for (int r = 0; r < R; ++r) left[r] = set1_f32(a[r][i]);
      for (int n = 0; n < N; ++n) {
        const VF right = Element<DTYPE>::load(b + n * W);
        for (int r = 0; r < R; ++r) sums[r][n] = fma_f32(left[r], right, sums[r][n]);
      }
    } else {
      VF right[N];
      for (int n = 0; n < N; ++n) right[n] = Element<DTYPE>::load(b + n * W);
      for (int r = 0; r < R; ++r) {
        const VF left = set1_f32(a[r][i]);
        for (int n = 0; n < N; ++n) sums[r][n] = fma_f32(left, right[n], sums[r][n]);
      }
    }
  }
}

// Scores of R rows against one page: scores[r * stride + position].
template <int DTYPE, int R>
void score_page(const HeadPage<DTYPE> &page, int64_t dims, const float *const *q, float scale, float *scores,
                int64_t stride) {
  constexpr int N = tile_vectors(R, MOST_OF_KEYS);
  const float *rows[R];
  for (int r = 0; r < R; ++r) rows[r] = q[r];
  for (int64_t at = 0; at < PAGE; at += N * W) {
    VF sums[R][N];
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n) sums[r][n] = zero_f32();
    multiply<DTYPE, R, N>(rows, page.keys + at, PAGE, dims, sums);
    for (int n = 0; n < N; ++n) {
      VF factor = set1_f32(scale);
      if (DTYPE == QLM_I8) factor = mul_f32(factor, load_f32(page.key_scales + at + n * W));
      for (int r = 0; r < R; ++r) store_f32(scores + r * stride + at + n * W, mul_f32(sums[r][n], factor));
    }
  }
}

// out[r][at ...] += the first `count` positions' values, weighted: N vectors of head dims at a time, then fewer.
template <int DTYPE, int R, int N>
void weigh_vectors(const HeadPage<DTYPE> &page, int64_t dims, int64_t count, const float *const (&weights)[R],
                   float *const *out, int64_t at) {
  for (; at + N * W <= dims; at += N * W) {
    VF sums[R][N];
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n) sums[r][n] = load_f32(out[r] + at + n * W);
    multiply<DTYPE, R, N>(weights, page.values + at, dims, count, sums);
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n) store_f32(out[r] + at + n * W, sums[r][n]);
  }
  if constexpr (N > 1) {
    weigh_vectors<DTYPE, R, N / 2>(page, dims, count, weights, out, at);
  } else if (at < dims) {
    const int64_t n = dims - at;
    for (int r = 0; r < R; ++r) {
      VF sum = load_f32_n(out[r] + at, n);
      for (int64_t i = 0; i < count; ++i)
        sum = fma_f32(set1_f32(weights[r][i]), Element<DTYPE>::load_n(page.values + i * dims + at, n), sum);
      store_f32_n(out[r] + at, sum, n);
    }
  }
}

template <int DTYPE, int R>
void weigh_page(const HeadPage<DTYPE> &page, int64_t dims, int64_t count, const float *weights, int64_t stride,
                float *const *out) {
  const float *rows[R];
  for (int r = 0; r < R; ++r) rows[r] = weights + r * stride;
  weigh_vectors<DTYPE, R, tile_vectors(R, MOST_OF_VALUES)>(page, dims, count, rows, out, 0);
}

// Scores -> exp(score - largest), not yet divided by their sum, which is returned; +0 from `visible` up to `end`, a
// multiple of PAGE. All NaN or infinite scores give NaN.
float softmax(float *scores, int64_t visible, int64_t end) {
  const int64_t padded = round_up(visible, PAGE);
  const VF lowest = set1_f32(-__builtin_inff());
  for (int64_t i = visible; i < padded; ++i) scores[i] = -__builtin_inff();
  VF top = lowest;
  for (int64_t i = 0; i < padded; i += W) top = max_f32(load_f32(scores + i), top);
  const VF largest = set1_f32(largest_f32(top));
  VF sum = zero_f32();
  for (int64_t i = 0; i < padded; i += W) {
    const VF weight = exp_f32(sub_f32(load_f32(scores + i), largest));
    store_f32(scores + i, weight);
    sum = add_f32(sum, weight);
  }
  memset(scores + padded, 0, (end - padded) * sizeof(float));
  return sum_f32(sum);
}

int64_t stride_of(int64_t visible) {
  // One line more than the positions need: rows a power of two apart would share a set of the cache.
  return round_up(visible, PAGE) + 16;
}

int64_t largest_of(const int64_t *values, int64_t count) {
  int64_t largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = values[i] > largest ? values[i] : largest;
  return largest;
}

// f.run<R>(first row) for tiles of R = 6, 4, 2 and 1 rows.
template <typename F> inline void each_tile(int64_t rows, F f) {
  int64_t r = 0;
  for (; r + 6 <= rows; r += 6) f.template run<6>(r);
  if (r + 4 <= rows) f.template run<4>(r), r += 4;
  if (r + 2 <= rows) f.template run<2>(r), r += 2;
  if (r < rows) f.template run<1>(r);
}

template <int DTYPE> struct Scores {
  const AttentionTask &task;
  const HeadPage<DTYPE> page;
  int64_t start, stride;
  float *scores;
  template <int R> void run(int64_t r) const {
    if (largest_of(task.visible + r, R) <= start) return;
    score_page<DTYPE, R>(page, task.cache.head_dim, task.q + r, task.scale, scores + r * stride + start, stride);
  }
};

template <int DTYPE> struct Values {
  const AttentionTask &task;
  const HeadPage<DTYPE> page;
  int64_t start, stride;
  const float *weights;
  template <int R> void run(int64_t r) const {
    const int64_t count = min_i64(largest_of(task.visible + r, R) - start, PAGE);
    if (count <= 0) return;
    weigh_page<DTYPE, R>(page, task.cache.head_dim, count, weights + r * stride + start, stride, task.out + r);
  }
};

template <int DTYPE> void attend(const AttentionTask &task, float *scores) {
  const int64_t dims = task.cache.head_dim, visible = largest_of(task.visible, task.rows);
  const int64_t stride = stride_of(visible), end = round_up(visible, PAGE);
  for (int64_t start = 0; start < end; start += PAGE) {
    const HeadPage<DTYPE> page(task.cache, task.kv_head, start / PAGE);
    each_tile(task.rows, Scores<DTYPE>{task, page, start, stride, scores});
  }

  float sums[ATTENTION_ROWS];
  for (int64_t r = 0; r < task.rows; ++r) {
    sums[r] = softmax(scores + r * stride, task.visible[r], end);
    memset(task.out[r], 0, dims * sizeof(float));
  }

  for (int64_t start = 0; start < end; start += PAGE) {
    const HeadPage<DTYPE> page(task.cache, task.kv_head, start / PAGE);
    if (DTYPE == QLM_I8) {
      for (int64_t r = 0; r < task.rows; ++r) {
        for (int64_t i = 0; i < PAGE; i += W) {
          float *weight = scores + r * stride + start + i;
          store_f32(weight, mul_f32(load_f32(weight), load_f32(page.value_scales + i)));
        }
      }
    }
    each_tile(task.rows, Values<DTYPE>{task, page, start, stride, scores});
  }

  for (int64_t r = 0; r < task.rows; ++r) {
    const VF sum = set1_f32(sums[r]);
    for (int64_t d = 0; d < dims; d += W) {
      const int64_t n = min_i64(W, dims - d);
      store_f32_n(task.out[r] + d, div_f32(load_f32_n(task.out[r] + d, n), sum), n);
    }
  }
}

// Whether |x| < limit everywhere; not where x is NaN.
bool all_below(const float *x, int64_t width, float limit) {
  const VF most = set1_f32(limit), one = set1_f32(1.0f);
  VF bad = zero_f32();
  for (int64_t i = 0; i < width; i += W) {
    bad = max_f32(bad, select_less(abs_f32(load_f32_n(x + i, min_i64(W, width - i))), most, zero_f32(), one));
  }
  return largest_f32(bad) == 0.0f;
}

float absmax_of(const float *x, int64_t width) {
  VF most = zero_f32();
  for (int64_t i = 0; i < width; i += W) most = max_f32(most, abs_f32(load_f32_n(x + i, min_i64(W, width - i))));
  return largest_f32(most);
}

template <int DTYPE> inline void convert(VF x, typename Element<DTYPE>::Type *to);
template <> inline void convert<QLM_F32>(VF x, float *to) { store_f32(to, x); }
template <> inline void convert<QLM_F16>(VF x, uint16_t *to) { store_f16(to, x); }
template <> inline void convert<QLM_BF16>(VF x, uint16_t *to) { store_bf16(to, x); }
template <> inline void convert<QLM_I8>(VF x, int8_t *to) { store_low_bytes(to, round_i32(x)); }

// x / scale [D], converted, to every `step`-th element.
template <int DTYPE>
void store_elements(const float *x, int64_t dims, float scale, typename Element<DTYPE>::Type *to, int64_t step) {
  const VF divisor = set1_f32(scale), most = set1_f32(127.0f), least = set1_f32(-127.0f);
  for (int64_t d = 0; d < dims; d += W) {
    const int64_t n = min_i64(W, dims - d);
    VF value = load_f32_n(x + d, n);
    if (DTYPE == QLM_I8) value = max_f32(least, min_f32(most, div_f32(value, divisor)));
    typename Element<DTYPE>::Type elements[W];
    convert<DTYPE>(value, elements);
    if (step == 1) {
      memcpy(to + d, elements, n * sizeof(elements[0]));
    } else {
      for (int64_t i = 0; i < n; ++i) to[(d + i) * step] = elements[i];
    }
  }
}

template <int DTYPE>
void store_position(const CacheView &cache, int64_t kv_head, int64_t position, const float *k, const float *v) {
  const int64_t dims = cache.head_dim, at = position % PAGE;
  const HeadPage<DTYPE> page(cache, kv_head, position / PAGE);
  float key_scale = 1.0f, value_scale = 1.0f;
  if (DTYPE == QLM_I8) {
    key_scale = absmax_of(k, dims) / 127.0f;
    value_scale = absmax_of(v, dims) / 127.0f;
    memcpy(page.key_scales + at, &key_scale, sizeof(float));
    memcpy(page.value_scales + at, &value_scale, sizeof(float));
    // Zeros (or what is too small for a scale) give codes of 0 instead of 0 / 0.
    if (key_scale == 0.0f) key_scale = __builtin_inff();
    if (value_scale == 0.0f) value_scale = __builtin_inff();
  }
  store_elements<DTYPE>(k, dims, key_scale, page.keys + at, PAGE);
  store_elements<DTYPE>(v, dims, value_scale, page.values + at * dims, 1);
}

}  // namespace

bool cache_store(const CacheView &cache, int64_t kv_head, int64_t position, const float *k, const float *v) {
  float limit = __builtin_inff();
  if (cache.dtype == QLM_F16) limit = 65520.0f;         // rounds to infinity
  if (cache.dtype == QLM_BF16) limit = 0x1.ffp+127f;    // likewise
  if (cache.dtype == QLM_I8) limit = 0x1.ffff00p+127f;  // 127 times the rounded scale could be infinite
  // Before anything is stored: a position that holds NaN could not even be multiplied by zero.
  if (!all_below(k, cache.head_dim, limit) || !all_below(v, cache.head_dim, limit)) return false;
  switch (cache.dtype) {
    case QLM_F32: store_position<QLM_F32>(cache, kv_head, position, k, v); break;
    case QLM_F16: store_position<QLM_F16>(cache, kv_head, position, k, v); break;
    case QLM_BF16: store_position<QLM_BF16>(cache, kv_head, position, k, v); break;
    case QLM_I8: store_position<QLM_I8>(cache, kv_head, position, k, v); break;
  }
  return true;
}

int64_t attention_scratch_bytes(int64_t visible) { return ATTENTION_ROWS * stride_of(visible) * 4; }

void attention(const AttentionTask &task, void *scratch) {
  float *scores = static_cast<float *>(scratch);
  switch (task.cache.dtype) {
    case QLM_F32: return attend<QLM_F32>(task, scores);
    case QLM_F16: return attend<QLM_F16>(task, scores);
    case QLM_BF16: return attend<QLM_BF16>(task, scores);
    case QLM_I8: return attend<QLM_I8>(task, scores);
  }
}

}  // namespace QLM_ISA
}  // namespace qlm
