// NF4 weights as bitsandbytes stores them: two codes in a byte along a row, an absmax for each block of 64 or more.
//
//   y[t, o] = sum_b absmax[o, b] a[t, b] / LEVEL_SCALE * (sum_{i in b} level[code[o, i]] x[t, i]) + bias[o]
//
// x: activations in parts of 64, int8 with the scale a = max|x| / 127. level: the 16 NF4 levels as int8, whose rounding
// is 0.0018 of absmax (root mean square over normal weights) where NF4's own is 0.035. The sums are exact.
#include "isa.h"
#include "simd.h"
#include "simd_math.h"

namespace qlm {
namespace QLM_ISA {
namespace {

constexpr int64_t BYTES = 4 * W;
constexpr int64_t PART = 64;
constexpr int64_t VECTORS = PART / BYTES;  // in a part
constexpr int ROWS = 4;
constexpr int TOKENS = REGISTERS == 32 ? 4 : 1;
constexpr int64_t CHUNK = 64;    // out features that are finished together
constexpr int64_t SEGMENT = 128; // parts whose scales are decoded together
constexpr int64_t FEW = 12;
constexpr int64_t AHEAD = 2048;  // bytes that are asked for in advance

// round(level * LEVEL_SCALE) + 128, for unsigned products; the scale is the one that rounds the levels best when weights
// are normal (all scales from 60 to 127 were tried). The levels: qlm/kernels/ops.py, NF4_LEVELS.
constexpr float LEVEL_SCALE = 124.13f;
constexpr uint8_t LEVELS[16] = {128 - 124, 128 - 86, 128 - 65, 128 - 49, 128 - 35, 128 - 23, 128 - 11, 128,
                                128 + 10,  128 + 20, 128 + 31, 128 + 42, 128 + 55, 128 + 70, 128 + 90, 128 + 124};

struct Prepared {
  int64_t parts, stride;
  float *scale;    // [T, parts], a / LEVEL_SCALE
  int8_t *codes;   // [T, stride], of each vector first the even, then the odd in features
  int32_t *start;  // [T, stride / 4]: what the sums start from to take the 128 off the levels again
};

Prepared prepared_of(const qlm_linear &linear, int64_t tokens, void *memory) {
  Prepared p;
  p.stride = linear.in_features;  // a multiple of 64
  p.parts = p.stride / PART;
  const int64_t head = round_up(tokens * p.parts * 4, 64);
  char *at = static_cast<char *>(memory);
  p.scale = reinterpret_cast<float *>(at);
  p.codes = reinterpret_cast<int8_t *>(at + head);
  p.start = reinterpret_cast<int32_t *>(at + head + tokens * p.stride);
  return p;
}

int64_t prepared_bytes(const qlm_linear &linear, int64_t tokens) {
  return round_up(tokens * (linear.in_features / PART) * 4, 64) + 2 * tokens * linear.in_features;
}

void prepare(const qlm_linear &linear, int64_t tokens, int64_t t, const float *x, void *memory) {
  const Prepared p = prepared_of(linear, tokens, memory);
  for (int64_t part = 0; part < p.parts; ++part) {
    const float *v = x + part * PART;
    VF most = zero_f32(), bad = zero_f32();
    for (int64_t i = 0; i < PART; i += W) {
      const VF a = load_f32(v + i);
      most = max_f32(most, abs_f32(a));
      bad = fma_f32(a, zero_f32(), bad);
    }
    const float absmax = largest_f32(most);
    const bool finite = sum_f32(bad) == 0.0f, empty = !(absmax > 1e-30f);  // as in linear_gptq.cpp
    const VF inverse = set1_f32(finite && !empty ? 127.0f / absmax : 0.0f);
    p.scale[t * p.parts + part] = !finite ? __builtin_nanf("") : empty ? 0.0f : absmax / 127.0f / LEVEL_SCALE;
    int8_t natural[PART];
    for (int64_t i = 0; i < PART; i += W)
      store_low_bytes(natural + i, finite ? round_i32(mul_f32(load_f32(v + i), inverse)) : zero_i32());
    int8_t *codes = p.codes + t * p.stride + part * PART;
    for (int64_t k = 0; k < VECTORS; ++k)
      for (int64_t i = 0; i < BYTES / 2; ++i) {
        codes[k * BYTES + i] = natural[k * BYTES + 2 * i];
        codes[k * BYTES + BYTES / 2 + i] = natural[k * BYTES + 2 * i + 1];
      }
    for (int64_t k = 0; k < VECTORS; ++k)
      store_i32(p.start + (t * p.stride + part * PART + k * BYTES) / 4,
                sub_i32(zero_i32(), dot_u8_s8(zero_i32(), set1_i8(-128), load_i32(codes + k * BYTES))));
  }
}

// absmax of `count` parts of 64 from the flat part number `from` on.
void decode_absmax(const qlm_linear &l, int64_t from, int64_t count, float *absmax) {
  const int64_t per_block = l.block / PART;
  if (l.scale) {
    // By memcpy, since files keep no alignment.
    const char *const scale = static_cast<const char *>(l.scale);
    if (per_block == 1) memcpy(absmax, scale + from * 4, count * 4);
    else
      for (int64_t i = 0; i < count; ++i) memcpy(absmax + i, scale + (from + i) / per_block * 4, 4);
    return;
  }
  for (int64_t i = 0; i < count;) {
    const int64_t block = (from + i) / per_block, nested = block / l.nested_block;
    if (per_block == 1) {
      // As long as one nested absmax serves.
      const int64_t end = min_i64(count, (nested + 1) * l.nested_block - from);
      const VF by = set1_f32(l.nested_absmax[nested]), add = set1_f32(l.nested_offset);
      for (; i + W <= end; i += W)
        store_f32(absmax + i, add_f32(mul_f32(gather_f32(l.nested_code, load_u8(l.absmax_code + from + i)), by), add));
      for (; i < end; ++i)
        absmax[i] = l.nested_code[l.absmax_code[from + i]] * l.nested_absmax[nested] + l.nested_offset;
    } else {
      absmax[i] = l.nested_code[l.absmax_code[block]] * l.nested_absmax[nested] + l.nested_offset;
      ++i;
    }
  }
}

// One row, parts from .. from + count, T tokens: total[t] += ...
template <int T>
inline void dot_row(const uint8_t *packed, const float *absmax, const Prepared &p, int64_t t0, int64_t from,
                    int64_t count, VF (&total)[T]) {
  const VI levels = table16(LEVELS);
  const int8_t *x = p.codes + t0 * p.stride + from * PART;
  const int32_t *start = p.start + (t0 * p.stride + from * PART) / 4;
  const float *scale = p.scale + t0 * p.parts + from;
  for (int64_t b = 0; b < count; ++b) {
    VI sum[T];
    if (T == 1) prefetch(packed + b * (PART / 2) + AHEAD);
    for (int64_t k = 0; k < VECTORS; ++k) {
      const VI weight = look_up(levels, nibbles(packed + (b * PART + k * BYTES) / 2));
      for (int t = 0; t < T; ++t) {
        const int64_t at = t * p.stride + b * PART + k * BYTES;
        const VI from_here = load_i32(start + at / 4);
        sum[t] = dot_u8_s8(k == 0 ? from_here : add_i32(sum[t], from_here), weight, load_i32(x + at));
      }
    }
    for (int t = 0; t < T; ++t)
      total[t] = fma_f32(to_f32(sum[t]), set1_f32(absmax[b] * scale[t * p.parts + b]), total[t]);
  }
}

template <int T>
void dot_rows(const qlm_linear &linear, const Prepared &p, int64_t t, int64_t o, int64_t rows, float *sums) {
  VF total[ROWS][T];
  for (int r = 0; r < ROWS; ++r)
    for (int k = 0; k < T; ++k) total[r][k] = zero_f32();
  for (int r = 0; r < ROWS && r < rows; ++r) {
    const uint8_t *packed = static_cast<const uint8_t *>(linear.weight) + (o + r) * linear.in_features / 2;
    VF row[T];
    for (int k = 0; k < T; ++k) row[k] = zero_f32();
    for (int64_t from = 0; from < p.parts; from += SEGMENT) {
      const int64_t count = min_i64(SEGMENT, p.parts - from);
      float absmax[SEGMENT];
      decode_absmax(linear, (o + r) * p.parts + from, count, absmax);
      dot_row<T>(packed + from * PART / 2, absmax, p, t, from, count, row);
    }
    for (int k = 0; k < T; ++k) total[r][k] = row[k];
  }
  for (int k = 0; k < T; ++k) store_sums4_f32(sums + k * CHUNK, total[0][k], total[1][k], total[2][k], total[3][k]);
}

void run(const qlm_linear &linear, int64_t tokens, const void *memory, int64_t o0, int64_t o1, Epilogue epilogue,
         float *y, int64_t y_stride) {
  const Prepared p = prepared_of(linear, tokens, const_cast<void *>(memory));
  alignas(64) float sums[FEW * CHUNK];
  const int64_t together = tokens <= FEW ? tokens : TOKENS;  // as in linear_int8.cpp
  for (int64_t o = o0; o < o1; o += CHUNK) {
    const int64_t rows = min_i64(CHUNK, o1 - o);
    for (int64_t t = 0; t < tokens; t += together) {
      const int64_t now = min_i64(together, tokens - t);
      for (int64_t r = 0; r < rows; r += ROWS)
        for (int64_t k = 0; k < now; k += TOKENS) {
          float *at = sums + k * CHUNK + r;
          switch (min_i64(TOKENS, now - k)) {
            case 1: dot_rows<1>(linear, p, t + k, o + r, rows - r, at); break;
#if defined(QLM_ISA_AVX512VNNI)
            case 2: dot_rows<2>(linear, p, t + k, o + r, rows - r, at); break;
            case 3: dot_rows<3>(linear, p, t + k, o + r, rows - r, at); break;
            case 4: dot_rows<4>(linear, p, t + k, o + r, rows - r, at); break;
#endif
          }
        }
      for (int64_t r = 0; r < rows; r += W)
        for (int64_t k = 0; k < now; ++k) {
          const int64_t n = rows - r, at = o + r;
          VF value = load_f32(sums + k * CHUNK + r);
          if (linear.bias) value = add_f32(value, load_f32_n(linear.bias + at, n));
          if (epilogue.activation != QLM_NONE) value = activate_vector(epilogue.activation, value);
          float *out = y + (t + k) * y_stride + at;
          if (epilogue.add) value = add_f32(load_f32_n(out, n), value);
          store_f32_n(out, value, n);
        }
    }
  }
}

int64_t granule(const qlm_linear &) { return W; }

}  // namespace

extern const LinearKernel linear_nf4;
const LinearKernel linear_nf4 = {prepared_bytes, prepare, run, granule};

}  // namespace QLM_ISA
}  // namespace qlm
