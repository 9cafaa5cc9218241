// H += x^T x from bfloat16 rows: products exact, sums float32. For CPUs with AVX512-BF16 alone; a float32 product of the
// same numbers takes three to four times as long, and any bfloat16 product of torch's rounds its result to bfloat16.
//
// One block of tokens after the other is packed: pairs of tokens side by side, as the instruction wants them, in panels of
// 64 features. Then each 64 x 64 tile of the lower triangle is summed up over them by one thread, in the order of the tokens.

#include <algorithm>
#include <cstdint>
#include <exception>
#include <new>

#include "abi.h"
#include "buffer.h"
#include "kernels.h"
#include "team.h"

#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 9 : __GNUC__ >= 10)
#include <immintrin.h>
#define QLM_GRAM_BF16 1
#endif

namespace {

constexpr int64_t WIDE = 64;              // features in a panel
constexpr int64_t DEEP = 256;             // tokens that a panel holds: 32 KiB
constexpr int64_t BLOCK_TOKENS = 4 * DEEP;  // packed at once

#if defined(QLM_GRAM_BF16)

#define QLM_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512bf16")))

constexpr int ROWS = 4, VECTORS = WIDE / 16;

// x: `tokens` <= DEEP rows of bfloat16, `stride` apart, the first of WIDE features. panel: [DEEP / 2][WIDE] pairs; beyond
// `tokens` it is zero.
QLM_AVX512_BF16 void pack(const uint16_t *x, int64_t stride, int64_t tokens, uint32_t *panel) {
  const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  for (int64_t t = 0; t < DEEP; t += 2, panel += WIDE) {
    for (int64_t i = 0; i < WIDE; i += 32) {
      __m512i even = _mm512_setzero_si512(), odd = even;
      if (t < tokens) even = _mm512_loadu_si512(x + t * stride + i);
      if (t + 1 < tokens) odd = _mm512_loadu_si512(x + (t + 1) * stride + i);
      const __m512i low = _mm512_unpacklo_epi16(even, odd), high = _mm512_unpackhi_epi16(even, odd);
      _mm512_store_si512(panel + i, _mm512_permutex2var_epi64(low, first, high));
      _mm512_store_si512(panel + i + 16, _mm512_permutex2var_epi64(low, second, high));
    }
  }
}

// hessian [ROWS, WIDE] += the products of ROWS features of `rows` with all of `columns`.
QLM_AVX512_BF16 void add_products(const uint32_t *rows, const uint32_t *columns, float *hessian, int64_t stride) {
  __m512 sums[ROWS][VECTORS];
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v) sums[r][v] = _mm512_setzero_ps();
  for (int64_t pair = 0; pair < DEEP / 2; ++pair, rows += WIDE, columns += WIDE) {
    __m512bh column[VECTORS];
    for (int v = 0; v < VECTORS; ++v) column[v] = (__m512bh)_mm512_load_si512(columns + 16 * v);
    for (int r = 0; r < ROWS; ++r) {
      const __m512bh row = (__m512bh)_mm512_set1_epi32(static_cast<int>(rows[r]));
      for (int v = 0; v < VECTORS; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], row, column[v]);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v) {
      float *const place = hessian + r * stride + 16 * v;
      _mm512_storeu_ps(place, _mm512_add_ps(_mm512_loadu_ps(place), sums[r][v]));
    }
}

#endif

}  // namespace

int32_t qlm_gram_bf16_runs_here(void) {
#if defined(QLM_GRAM_BF16)
  return qlm::has_avx512_bf16();
#else
  return 0;
#endif
}

int qlm_gram_bf16(qlm_team *team, const uint16_t *x, int64_t tokens, int64_t features, float *hessian) {
  if (!qlm_gram_bf16_runs_here()) return qlm::fail(QLM_BAD_ARGUMENT, "gram: this machine or %s has no AVX512-BF16", qlm_isa_selected());
  if (tokens < 0 || features < WIDE || features % WIDE != 0)
    return qlm::fail(QLM_BAD_ARGUMENT, "gram: %lld tokens of %lld features; features are a multiple of %lld", (long long)tokens,
                     (long long)features, (long long)WIDE);
#if defined(QLM_GRAM_BF16)
  const int64_t panels = features / WIDE, panel_pairs = DEEP / 2 * WIDE, deepest = BLOCK_TOKENS / DEEP;
  qlm::Buffer packed;
  try {
    packed.reserve(deepest * panels * panel_pairs * 4);
  } catch (const std::bad_alloc &) {
    return qlm::fail(QLM_NO_MEMORY, "gram: no memory for %lld tokens of %lld features", (long long)BLOCK_TOKENS, (long long)features);
  }
  // Panel p of depth d is number d * panels + p.
  const auto panel = [&](int64_t depth, int64_t number) {
    return static_cast<uint32_t *>(packed.bytes()) + (depth * panels + number) * panel_pairs;
  };
  try {
    for (int64_t start = 0; start < tokens; start += BLOCK_TOKENS) {
      const int64_t depths = qlm::ceil_div(std::min(BLOCK_TOKENS, tokens - start), DEEP);
      team->run([&](int) {
        team->each(depths * panels, [&](int64_t item) {
          const int64_t depth = item / panels, number = item % panels, token = start + depth * DEEP;
          pack(x + token * features + number * WIDE, features, std::min(DEEP, tokens - token), panel(depth, number));
        });
      });
      team->run([&](int) {
        // The tiles of the lower triangle, row by row: (0, 0), (1, 0), (1, 1), (2, 0), ...
        int64_t row = 0, first = 0;
        team->each(panels * (panels + 1) / 2, [&](int64_t item) {
          while (item > first + row) first += ++row;
          const int64_t column = item - first;
          for (int64_t depth = 0; depth < depths; ++depth)
            for (int64_t r = 0; r < WIDE; r += ROWS)
              add_products(panel(depth, row) + r, panel(depth, column), hessian + (row * WIDE + r) * features + column * WIDE, features);
        });
      });
    }
  } catch (const std::exception &error) {  // a thread that could not be started
    return qlm::fail(QLM_NO_MEMORY, "%s", error.what());
  }
#else
  (void)team, (void)x, (void)hessian;
#endif
  return QLM_OK;
}
