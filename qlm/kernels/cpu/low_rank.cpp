// An adapter beside a linear (LoRA, arXiv:2106.09685): hidden = A x for each token, then y += B hidden. float32 throughout. The order of
// every sum depends on the widths alone.
#include "isa.h"
#include "simd_math.h"

namespace qlm {
namespace QLM_ISA {

namespace {

// Out features that are summed up side by side.
constexpr int VECTORS = 4;

// y [o, o + n) of one token, n <= VECTORS * W.
inline void add_part(const qlm_linear &linear, const float *hidden, int64_t o, int64_t n, int32_t activation, float *y) {
  VF sum[VECTORS];
  for (int v = 0; v < VECTORS; ++v) sum[v] = v * W < n ? load_f32_n(y + o + v * W, n - v * W) : zero_f32();
  for (int64_t j = 0; j < linear.rank; ++j) {
    const float *const b = linear.adapter_b + j * linear.out_features + o;
    const VF h = set1_f32(hidden[j]);
    for (int v = 0; v < VECTORS && v * W < n; ++v) sum[v] = fma_f32(h, load_f32_n(b + v * W, n - v * W), sum[v]);
  }
  for (int v = 0; v < VECTORS && v * W < n; ++v) store_f32_n(y + o + v * W, activate_vector(activation, sum[v]), n - v * W);
}

}  // namespace

void low_rank_down(const qlm_linear &linear, const float *x, float *hidden) {
  const int64_t width = linear.in_features;
  for (int64_t j = 0; j < linear.rank; ++j) {
    const float *const a = linear.adapter_a + j * width;
    VF part[4] = {zero_f32(), zero_f32(), zero_f32(), zero_f32()};
    int64_t i = 0;
    for (; i + 4 * W <= width; i += 4 * W)
      for (int p = 0; p < 4; ++p) part[p] = fma_f32(load_f32(x + i + p * W), load_f32(a + i + p * W), part[p]);
    for (; i < width; i += W) part[0] = fma_f32(load_f32_n(x + i, width - i), load_f32_n(a + i, width - i), part[0]);
    hidden[j] = sum_f32(add_f32(add_f32(part[0], part[1]), add_f32(part[2], part[3])));
  }
}

void low_rank_up(const qlm_linear &linear, int64_t tokens, const float *hidden, int64_t o0, int64_t o1, int32_t activation,
                 float *y, int64_t y_stride) {
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t o = o0; o < o1; o += VECTORS * W)
      add_part(linear, hidden + t * linear.rank, o, min_i64(VECTORS * W, o1 - o), activation, y + t * y_stride);
}

}  // namespace QLM_ISA
}  // namespace qlm
