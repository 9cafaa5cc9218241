// 8 lanes: AVX2, FMA and F16C; with AVX-VNNI the byte products are one instruction.
#pragma once

#include <immintrin.h>

namespace qlm {
namespace QLM_ISA {

constexpr int W = 8;
constexpr int REGISTERS = 16;
typedef __m256 VF;
typedef __m256i VI;

static inline __m256i first(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n > 8 ? 8 : (int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

static inline VF zero_f32() { return _mm256_setzero_ps(); }
static inline VF set1_f32(float x) { return _mm256_set1_ps(x); }
static inline VF load_f32(const float *p) { return _mm256_loadu_ps(p); }
static inline VF load_f32_n(const float *p, int64_t n) { return _mm256_maskload_ps(p, first(n)); }
static inline void store_f32(float *p, VF x) { _mm256_storeu_ps(p, x); }
static inline void store_f32_n(float *p, VF x, int64_t n) { _mm256_maskstore_ps(p, first(n), x); }
static inline VF add_f32(VF a, VF b) { return _mm256_add_ps(a, b); }
static inline VF sub_f32(VF a, VF b) { return _mm256_sub_ps(a, b); }
static inline VF mul_f32(VF a, VF b) { return _mm256_mul_ps(a, b); }
static inline VF div_f32(VF a, VF b) { return _mm256_div_ps(a, b); }
static inline VF fma_f32(VF a, VF b, VF c) { return _mm256_fmadd_ps(a, b, c); }
static inline VF max_f32(VF a, VF b) { return _mm256_max_ps(a, b); }
static inline VF min_f32(VF a, VF b) { return _mm256_min_ps(a, b); }
static inline VF abs_f32(VF a) { return _mm256_and_ps(a, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff))); }
static inline VF sqrt_f32(VF a) { return _mm256_sqrt_ps(a); }
static inline VF to_f32(VI a) { return _mm256_cvtepi32_ps(a); }
static inline VI round_i32(VF a) { return _mm256_cvtps_epi32(a); }
static inline VF bits_f32(VI a) { return _mm256_castsi256_ps(a); }
static inline VI bits_i32(VF a) { return _mm256_castps_si256(a); }
static inline VF select_less(VF a, VF b, VF x, VF y) { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
static inline float sum_f32(VF a) {
  __m128 c = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  c = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps(c, c, 1)));
}
static inline void store_sums4_f32(float *p, VF a, VF b, VF c, VF d) {
  __m256 abcd = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
}
static inline float largest_f32(VF a) {
  __m128 c = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  c = _mm_max_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_max_ss(c, _mm_shuffle_ps(c, c, 1)));
}
static inline float smallest_f32(VF a) {
  __m128 c = _mm_min_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  c = _mm_min_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_min_ss(c, _mm_shuffle_ps(c, c, 1)));
}

static inline VF load_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
static inline void store_f16(uint16_t *p, VF x) {
  _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline VF load_bf16(const uint16_t *p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
static inline void store_bf16(uint16_t *p, VF x) {
  __m256i bits = _mm256_castps_si256(x);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
  __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
  _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(packed));
}

static inline VI zero_i32() { return _mm256_setzero_si256(); }
static inline VI set1_i32(int32_t x) { return _mm256_set1_epi32(x); }
static inline VI set1_i8(int8_t x) { return _mm256_set1_epi8(x); }
static inline VI load_i32(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
static inline VI load_bytes_n(const void *p, int64_t bytes) {
  if (bytes >= 32) return load_i32(p);
  uint8_t whole[32] = {};
  memcpy(whole, p, bytes);
  return load_i32(whole);
}
static inline VI load_i32_n(const void *p, int64_t n) { return _mm256_maskload_epi32((const int *)p, first(n)); }
static inline void store_i32(void *p, VI x) { _mm256_storeu_si256((__m256i *)p, x); }
static inline void store_i32_n(void *p, VI x, int64_t n) { _mm256_maskstore_epi32((int *)p, first(n), x); }
static inline VI add_i32(VI a, VI b) { return _mm256_add_epi32(a, b); }
static inline VI sub_i32(VI a, VI b) { return _mm256_sub_epi32(a, b); }
static inline VI mul_i32(VI a, VI b) { return _mm256_mullo_epi32(a, b); }
static inline VI and_i32(VI a, VI b) { return _mm256_and_si256(a, b); }
static inline VI or_i32(VI a, VI b) { return _mm256_or_si256(a, b); }
static inline VI xor_i32(VI a, VI b) { return _mm256_xor_si256(a, b); }
template <int N> static inline VI shift_right(VI a) { return _mm256_srli_epi32(a, N); }
template <int N> static inline VI shift_left(VI a) { return _mm256_slli_epi32(a, N); }
static inline int32_t sum_i32(VI a) {
  __m128i c = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  c = _mm_add_epi32(c, _mm_shuffle_epi32(c, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(c, _mm_shuffle_epi32(c, 0xb1)));
}
static inline void store_sums4_i32(int32_t *p, VI a, VI b, VI c, VI d) {
  __m256i abcd = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
  _mm_storeu_si128((__m128i *)p, _mm_add_epi32(_mm256_castsi256_si128(abcd), _mm256_extracti128_si256(abcd, 1)));
}
static inline VI load_u8(const uint8_t *p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)); }
static inline VI load_i8(const int8_t *p) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)); }
static inline void store_low_bytes(void *p, VI x) {
  const __m256i low = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                       0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  __m256i bytes = _mm256_shuffle_epi8(x, low);
  int32_t halves[2] = {_mm256_extract_epi32(bytes, 0), _mm256_extract_epi32(bytes, 4)};
  memcpy(p, halves, 8);
}

#if defined(QLM_ISA_AVXVNNI)
#if defined(__AVXVNNI__)
static inline VI dot_u8_s8(VI sum, VI u8, VI s8) { return _mm256_dpbusd_avx_epi32(sum, u8, s8); }
#else  // the EVEX form of the same instruction, to run this file where there is AVX512-VNNI only
static inline VI dot_u8_s8(VI sum, VI u8, VI s8) { return _mm256_dpbusd_epi32(sum, u8, s8); }
#endif
static inline VI dot_u7_s8(VI sum, VI u7, VI s8) { return dot_u8_s8(sum, u7, s8); }
#else
// maddubs adds pairs in 16 bits with saturation: 2 * 127 * 128 fits, 2 * 255 * 127 does not.
static inline VI dot_u7_s8(VI sum, VI u7, VI s8) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(u7, s8), _mm256_set1_epi16(1)));
}
// The top bits apart: 2 * 128 * -128 fits as well.
static inline VI dot_u8_s8(VI sum, VI u8, VI s8) {
  const __m256i top = _mm256_set1_epi8(-128), one = _mm256_set1_epi16(1);
  __m256i low = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_andnot_si256(top, u8), s8), one);
  __m256i high = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_and_si256(top, u8), s8), one);
  return _mm256_add_epi32(sum, _mm256_add_epi32(low, high));
}
#endif

static inline VI table16(const void *p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p)); }
static inline VI look_up(VI table, VI index) { return _mm256_shuffle_epi8(table, index); }

static inline VI nibbles(const void *p) {
  __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p));
  const __m256i shift = _mm256_setr_epi64x(4, 4, 0, 0);
  return _mm256_and_si256(_mm256_srlv_epi64(both, shift), _mm256_set1_epi8(15));
}

static inline VF gather_f32(const float *table, VI index) { return _mm256_i32gather_ps(table, index, 4); }

static inline void prefetch(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }
// Into the second-level cache, which can wait for more lines at a time than the first.
static inline void prefetch_far(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T1); }

}  // namespace QLM_ISA
}  // namespace qlm
