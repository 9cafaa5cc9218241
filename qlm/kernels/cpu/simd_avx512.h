// 16 lanes: AVX-512 F, BW, DQ, VL and VNNI.
#pragma once

#include <immintrin.h>

namespace qlm {
namespace QLM_ISA {

constexpr int W = 16;
constexpr int REGISTERS = 32;
typedef __m512 VF;
typedef __m512i VI;

static inline __mmask16 first(int64_t n) { return n >= 16 ? 0xffff : static_cast<__mmask16>((1u << n) - 1); }
static inline __mmask64 first_bytes(int64_t n) { return n >= 64 ? ~0ull : (1ull << n) - 1; }

static inline VF zero_f32() { return _mm512_setzero_ps(); }
static inline VF set1_f32(float x) { return _mm512_set1_ps(x); }
static inline VF load_f32(const float *p) { return _mm512_loadu_ps(p); }
static inline VF load_f32_n(const float *p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
static inline void store_f32(float *p, VF x) { _mm512_storeu_ps(p, x); }
static inline void store_f32_n(float *p, VF x, int64_t n) { _mm512_mask_storeu_ps(p, first(n), x); }
static inline VF add_f32(VF a, VF b) { return _mm512_add_ps(a, b); }
static inline VF sub_f32(VF a, VF b) { return _mm512_sub_ps(a, b); }
static inline VF mul_f32(VF a, VF b) { return _mm512_mul_ps(a, b); }
static inline VF div_f32(VF a, VF b) { return _mm512_div_ps(a, b); }
static inline VF fma_f32(VF a, VF b, VF c) { return _mm512_fmadd_ps(a, b, c); }  // a * b + c
// The second operand where one of them is NaN.
static inline VF max_f32(VF a, VF b) { return _mm512_max_ps(a, b); }
static inline VF min_f32(VF a, VF b) { return _mm512_min_ps(a, b); }
static inline VF abs_f32(VF a) { return _mm512_abs_ps(a); }
static inline VF sqrt_f32(VF a) { return _mm512_sqrt_ps(a); }
static inline VF to_f32(VI a) { return _mm512_cvtepi32_ps(a); }
static inline VI round_i32(VF a) { return _mm512_cvtps_epi32(a); }
static inline VF bits_f32(VI a) { return _mm512_castsi512_ps(a); }
static inline VI bits_i32(VF a) { return _mm512_castps_si512(a); }
// a < b ? x : y
static inline VF select_less(VF a, VF b, VF x, VF y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
}
// Always the same order: halves, quarters, ...
static inline float sum_f32(VF a) {
  __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  c = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps(c, c, 1)));
}
// The sums of four vectors, each added up in the same order.
static inline void store_sums4_f32(float *p, VF a, VF b, VF c, VF d) {
  __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  __m512 abcd = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))),
                              _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))));
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
static inline float largest_f32(VF a) { return _mm512_reduce_max_ps(a); }
static inline float smallest_f32(VF a) { return _mm512_reduce_min_ps(a); }

static inline VF load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
static inline void store_f16(uint16_t *p, VF x) {
  _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline VF load_bf16(const uint16_t *p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
// Round to nearest, halves to even; NaN stays NaN.
static inline void store_bf16(uint16_t *p, VF x) {
  __m512i bits = _mm512_castps_si512(x);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  rounded = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), rounded, _mm512_set1_epi32(0x7fc00000));
  _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

static inline VI zero_i32() { return _mm512_setzero_si512(); }
static inline VI set1_i32(int32_t x) { return _mm512_set1_epi32(x); }
static inline VI set1_i8(int8_t x) { return _mm512_set1_epi8(x); }
static inline VI load_i32(const void *p) { return _mm512_loadu_si512(p); }
static inline VI load_bytes_n(const void *p, int64_t bytes) { return _mm512_maskz_loadu_epi8(first_bytes(bytes), p); }
static inline VI load_i32_n(const void *p, int64_t n) { return _mm512_maskz_loadu_epi32(first(n), p); }
static inline void store_i32(void *p, VI x) { _mm512_storeu_si512(p, x); }
static inline void store_i32_n(void *p, VI x, int64_t n) { _mm512_mask_storeu_epi32(p, first(n), x); }
static inline VI add_i32(VI a, VI b) { return _mm512_add_epi32(a, b); }
static inline VI sub_i32(VI a, VI b) { return _mm512_sub_epi32(a, b); }
static inline VI mul_i32(VI a, VI b) { return _mm512_mullo_epi32(a, b); }
static inline VI and_i32(VI a, VI b) { return _mm512_and_si512(a, b); }
static inline VI or_i32(VI a, VI b) { return _mm512_or_si512(a, b); }
static inline VI xor_i32(VI a, VI b) { return _mm512_xor_si512(a, b); }
template <int N> static inline VI shift_right(VI a) { return _mm512_srli_epi32(a, N); }  // logical, 32-bit lanes
template <int N> static inline VI shift_left(VI a) { return _mm512_slli_epi32(a, N); }
// Not _mm512_reduce_add_epi32: GCC's header adds plain ints in it, which may not wrap around.
static inline int32_t sum_i32(VI a) {
  __m256i b = _mm256_add_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
  __m128i c = _mm_add_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
  c = _mm_add_epi32(c, _mm_shuffle_epi32(c, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(c, _mm_shuffle_epi32(c, 0xb1)));
}
// The sums of four vectors, as four int32.
static inline void store_sums4_i32(int32_t *p, VI a, VI b, VI c, VI d) {
  __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  __m512i abcd = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(abcd), _mm512_extracti64x4_epi64(abcd, 1));
  _mm_storeu_si128((__m128i *)p, _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
}
static inline VI load_u8(const uint8_t *p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }
static inline VI load_i8(const int8_t *p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)); }
// The low byte of each lane; lanes are in [-128, 127], or [0, 255] for unsigned bytes.
static inline void store_low_bytes(void *p, VI x) { _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(x)); }

// Each lane: sum + the four products of its unsigned and signed bytes. Exact but for int32 wrapping around.
static inline VI dot_u8_s8(VI sum, VI u8, VI s8) {
#if defined(__GNUC__) && !defined(__clang__)
  // With the intrinsic GCC 12 copies accumulators around in tiles of 20 and more, and spills them: half the speed.
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u8), "vm"(s8));
  return sum;
#else
  return _mm512_dpbusd_epi32(sum, u8, s8);
#endif
}
// The same where u8 is at most 127, which some instruction sets do faster.
static inline VI dot_u7_s8(VI sum, VI u7, VI s8) { return dot_u8_s8(sum, u7, s8); }

// A table of 16 bytes in each 16-byte part, looked up by the low 4 bits of each byte; bit 7 of an index must be 0.
static inline VI table16(const void *p) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)p)); }
static inline VI look_up(VI table, VI index) { return _mm512_shuffle_epi8(table, index); }

// 2 * W bytes at p, to both halves of a VI: the lower half shifted right by 4 bits, the upper half as it is, both masked
// to the low nibbles of the bytes: first the high nibbles of all bytes, then the low ones.
static inline VI nibbles(const void *p) {
  __m512i both = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)p));
  const __m512i shift = _mm512_set_epi64(0, 0, 0, 0, 4, 4, 4, 4);
  return _mm512_and_si512(_mm512_srlv_epi64(both, shift), _mm512_set1_epi8(15));
}

// table[index] for each lane.
static inline VF gather_f32(const float *table, VI index) { return _mm512_i32gather_ps(index, table, 4); }

static inline void prefetch(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }
// Into the second-level cache, which can wait for more lines at a time than the first.
static inline void prefetch_far(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T1); }

}  // namespace QLM_ISA
}  // namespace qlm
