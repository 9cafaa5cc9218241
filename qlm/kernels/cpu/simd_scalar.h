// 4 lanes in plain C++, for every CPU. Compilers turn most of it into the vectors that their target has.
#pragma once

#include <cmath>

namespace qlm {
namespace QLM_ISA {

constexpr int W = 4;
constexpr int REGISTERS = 16;
struct VF { float lane[4]; };
struct VI { int32_t lane[4]; };

#define QLM_EACH(type, expression)                  \
  type r;                                           \
  for (int i = 0; i < 4; ++i) r.lane[i] = (expression); \
  return r

static inline VF zero_f32() { QLM_EACH(VF, 0.0f); }
static inline VF set1_f32(float x) { QLM_EACH(VF, x); }
static inline VF load_f32(const float *p) { VF r; memcpy(&r, p, 16); return r; }
static inline VF load_f32_n(const float *p, int64_t n) { VF r = zero_f32(); memcpy(&r, p, (n > 4 ? 4 : n) * 4); return r; }
static inline void store_f32(float *p, VF x) { memcpy(p, &x, 16); }
static inline void store_f32_n(float *p, VF x, int64_t n) { memcpy(p, &x, (n > 4 ? 4 : n) * 4); }
static inline VF add_f32(VF a, VF b) { QLM_EACH(VF, a.lane[i] + b.lane[i]); }
static inline VF sub_f32(VF a, VF b) { QLM_EACH(VF, a.lane[i] - b.lane[i]); }
static inline VF mul_f32(VF a, VF b) { QLM_EACH(VF, a.lane[i] * b.lane[i]); }
static inline VF div_f32(VF a, VF b) { QLM_EACH(VF, a.lane[i] / b.lane[i]); }
// Not fused: a call of fmaf for each lane is slow where the CPU has no such instruction.
static inline VF fma_f32(VF a, VF b, VF c) { QLM_EACH(VF, a.lane[i] * b.lane[i] + c.lane[i]); }
static inline VF max_f32(VF a, VF b) { QLM_EACH(VF, a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]); }
static inline VF min_f32(VF a, VF b) { QLM_EACH(VF, a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]); }
static inline VF bits_f32(VI a) { VF r; memcpy(&r, &a, 16); return r; }
static inline VI bits_i32(VF a) { VI r; memcpy(&r, &a, 16); return r; }
static inline VF abs_f32(VF a) { QLM_EACH(VF, __builtin_fabsf(a.lane[i])); }
static inline VF sqrt_f32(VF a) { QLM_EACH(VF, __builtin_sqrtf(a.lane[i])); }
static inline VF to_f32(VI a) { QLM_EACH(VF, static_cast<float>(a.lane[i])); }
// As the vector instructions do: what does not fit becomes the smallest int32.
static inline int32_t round_one(float x) {
  return x >= -2147483648.0f && x < 2147483648.0f ? static_cast<int32_t>(__builtin_rintf(x)) : INT32_MIN;
}
static inline VI round_i32(VF a) { QLM_EACH(VI, round_one(a.lane[i])); }
static inline VF select_less(VF a, VF b, VF x, VF y) { QLM_EACH(VF, a.lane[i] < b.lane[i] ? x.lane[i] : y.lane[i]); }
static inline float sum_f32(VF a) { return (a.lane[0] + a.lane[2]) + (a.lane[1] + a.lane[3]); }
static inline void store_sums4_f32(float *p, VF a, VF b, VF c, VF d) {
  p[0] = sum_f32(a), p[1] = sum_f32(b), p[2] = sum_f32(c), p[3] = sum_f32(d);
}
static inline float largest_f32(VF a) {
  float x = a.lane[0] > a.lane[1] ? a.lane[0] : a.lane[1], y = a.lane[2] > a.lane[3] ? a.lane[2] : a.lane[3];
  return x > y ? x : y;
}
static inline float smallest_f32(VF a) {
  float x = a.lane[0] < a.lane[1] ? a.lane[0] : a.lane[1], y = a.lane[2] < a.lane[3] ? a.lane[2] : a.lane[3];
  return x < y ? x : y;
}

static inline float from_bits(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline uint32_t to_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
// IEEE 754 binary16, subnormals included.
static inline float half_to_float(uint16_t h) {
  uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3ff;
  if (exponent == 31) return from_bits(sign | 0x7f800000 | (mantissa ? 0x400000 | mantissa << 13 : 0));
  if (exponent == 0) return from_bits(sign | to_bits(static_cast<float>(mantissa) * 5.9604644775390625e-8f));  // 2^-24
  return from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}
static inline uint16_t float_to_half(float x) {
  uint32_t bits = to_bits(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to 65536
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 puts the right bits last, rounded
    uint32_t sum = to_bits(from_bits(magnitude) + 0.5f);
    return static_cast<uint16_t>(sign | (sum - 0x3f000000));
  }
  uint32_t odd = (magnitude >> 13) & 1;
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xfff + odd) >> 13));
}
// By memcpy, since files keep no alignment.
static inline VF load_f16(const void *p) { uint16_t h[4]; memcpy(h, p, 8); QLM_EACH(VF, half_to_float(h[i])); }
static inline void store_f16(uint16_t *p, VF x) { for (int i = 0; i < 4; ++i) p[i] = float_to_half(x.lane[i]); }
static inline VF load_bf16(const void *p) { uint16_t h[4]; memcpy(h, p, 8); QLM_EACH(VF, from_bits(static_cast<uint32_t>(h[i]) << 16)); }
static inline void store_bf16(uint16_t *p, VF x) {
  for (int i = 0; i < 4; ++i) {
    uint32_t bits = to_bits(x.lane[i]);
    p[i] = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
}

static inline VI zero_i32() { QLM_EACH(VI, 0); }
static inline VI set1_i32(int32_t x) { QLM_EACH(VI, x); }
static inline VI set1_i8(int8_t x) { VI r; memset(&r, x, 16); return r; }
static inline VI load_i32(const void *p) { VI r; memcpy(&r, p, 16); return r; }
static inline VI load_bytes_n(const void *p, int64_t bytes) { VI r = zero_i32(); memcpy(&r, p, bytes > 16 ? 16 : bytes); return r; }
static inline VI load_i32_n(const void *p, int64_t n) { return load_bytes_n(p, n * 4); }
static inline void store_i32(void *p, VI x) { memcpy(p, &x, 16); }
static inline void store_i32_n(void *p, VI x, int64_t n) { memcpy(p, &x, (n > 4 ? 4 : n) * 4); }
// Through unsigned: sums wrap around, as in the vector instructions.
static inline int32_t wrap(uint32_t x) { return static_cast<int32_t>(x); }
static inline VI add_i32(VI a, VI b) { QLM_EACH(VI, wrap(static_cast<uint32_t>(a.lane[i]) + static_cast<uint32_t>(b.lane[i]))); }
static inline VI sub_i32(VI a, VI b) { QLM_EACH(VI, wrap(static_cast<uint32_t>(a.lane[i]) - static_cast<uint32_t>(b.lane[i]))); }
static inline VI mul_i32(VI a, VI b) { QLM_EACH(VI, wrap(static_cast<uint32_t>(a.lane[i]) * static_cast<uint32_t>(b.lane[i]))); }
static inline VI and_i32(VI a, VI b) { QLM_EACH(VI, a.lane[i] & b.lane[i]); }
static inline VI or_i32(VI a, VI b) { QLM_EACH(VI, a.lane[i] | b.lane[i]); }
static inline VI xor_i32(VI a, VI b) { QLM_EACH(VI, a.lane[i] ^ b.lane[i]); }
template <int N> static inline VI shift_right(VI a) { QLM_EACH(VI, wrap(static_cast<uint32_t>(a.lane[i]) >> N)); }
template <int N> static inline VI shift_left(VI a) { QLM_EACH(VI, wrap(static_cast<uint32_t>(a.lane[i]) << N)); }
static inline int32_t sum_i32(VI a) {
  uint32_t sum = 0;
  for (int i = 0; i < 4; ++i) sum += static_cast<uint32_t>(a.lane[i]);
  return wrap(sum);
}
static inline void store_sums4_i32(int32_t *p, VI a, VI b, VI c, VI d) {
  p[0] = sum_i32(a), p[1] = sum_i32(b), p[2] = sum_i32(c), p[3] = sum_i32(d);
}
static inline VI load_u8(const uint8_t *p) { QLM_EACH(VI, p[i]); }
static inline VI load_i8(const int8_t *p) { QLM_EACH(VI, p[i]); }
static inline void store_low_bytes(void *p, VI x) {
  for (int i = 0; i < 4; ++i) static_cast<uint8_t *>(p)[i] = static_cast<uint8_t>(x.lane[i]);
}

static inline VI dot_u8_s8(VI sum, VI u8, VI s8) {
  uint8_t u[16];
  int8_t s[16];
  memcpy(u, &u8, 16);
  memcpy(s, &s8, 16);
  for (int i = 0; i < 4; ++i) {
    int32_t four = 0;
    for (int j = 0; j < 4; ++j) four += u[4 * i + j] * s[4 * i + j];
    sum.lane[i] = wrap(static_cast<uint32_t>(sum.lane[i]) + static_cast<uint32_t>(four));
  }
  return sum;
}
static inline VI dot_u7_s8(VI sum, VI u7, VI s8) { return dot_u8_s8(sum, u7, s8); }

static inline VI table16(const void *p) { return load_i32(p); }
static inline VI look_up(VI table, VI index) {
  uint8_t t[16], n[16], r[16];
  memcpy(t, &table, 16);
  memcpy(n, &index, 16);
  for (int i = 0; i < 16; ++i) r[i] = t[n[i] & 15];
  return load_i32(r);
}

static inline VI nibbles(const void *p) {
  uint8_t packed[8], r[16];
  memcpy(packed, p, 8);
  for (int i = 0; i < 8; ++i) {
    r[i] = packed[i] >> 4;
    r[8 + i] = packed[i] & 15;
  }
  return load_i32(r);
}

static inline VF gather_f32(const float *table, VI index) { QLM_EACH(VF, table[index.lane[i]]); }

static inline void prefetch(const void *p) { __builtin_prefetch(p); }
static inline void prefetch_far(const void *p) { __builtin_prefetch(p, 0, 2); }

#undef QLM_EACH

}  // namespace QLM_ISA
}  // namespace qlm
