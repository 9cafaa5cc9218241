// exp, erf and the activations on W lanes, from polynomials, so that no vector library is needed.
//
// The coefficients are minimax fits made for this file: the polynomial of exp by Remez exchange, the rational function
// of erf by Lawson's reweighted least squares, both on relative error with 40 digits, rounded to float32 afterwards. Each
// comment gives the fit's error before that rounding.
#pragma once

#include "simd.h"

namespace qlm {
namespace QLM_ISA {

// e^x within 1 ulp, subnormal results too; 0 for -inf, inf from 88.7229 on, NaN for NaN.
static inline VF exp_f32(VF x) {
  // Past these ends the result is 0 or inf whatever x is. A NaN is max's second operand, and goes through.
  x = min_f32(set1_f32(89.0f), max_f32(set1_f32(-104.0f), x));
  // x = n ln 2 + r, |r| <= ln(2) / 2; the first part of ln 2 has 9 bits, so that its product with n is exact.
  VI n = round_i32(mul_f32(x, set1_f32(1.44269504f)));
  VF whole = to_f32(n);
  VF r = fma_f32(whole, set1_f32(-0.693359375f), x);
  r = fma_f32(whole, set1_f32(2.12194440e-4f), r);
  // (e^r - 1 - r) / r^2 in degree 4: 3.1e-9 of e^r.
  VF p = set1_f32(0.00138144654855f);
  p = fma_f32(p, r, set1_f32(0.00836878045245f));
  p = fma_f32(p, r, set1_f32(0.0416683942486f));
  p = fma_f32(p, r, set1_f32(0.166665201074f));
  p = fma_f32(p, r, set1_f32(0.499999934123f));
  p = fma_f32(p, mul_f32(r, r), r);
  p = add_f32(p, set1_f32(1.0f));
  // 2^n in two factors: n goes from -150 to 128, further than one exponent does. NaN gives a meaningless n, times NaN.
  VI half = sub_i32(shift_right<1>(add_i32(n, set1_i32(256))), set1_i32(128));
  VI rest = sub_i32(n, half);
  VF scale = bits_f32(shift_left<23>(add_i32(half, set1_i32(127))));
  return mul_f32(mul_f32(p, scale), bits_f32(shift_left<23>(add_i32(rest, set1_i32(127)))));
}

// erf(x), to 1.5e-7; odd, +-1 from |x| > 4 on, NaN for NaN.
static inline VF erf_f32(VF x) {
  // x P(x^2) / Q(x^2) for |x| <= 4: 2.5e-8 of erf(x). All coefficients are positive: nothing cancels.
  VF t = mul_f32(x, x);
  VF p = set1_f32(1.986816560e-6f);
  p = fma_f32(p, t, set1_f32(2.845612752e-4f));
  p = fma_f32(p, t, set1_f32(3.883143566e-3f));
  p = fma_f32(p, t, set1_f32(5.310112805e-2f));
  p = fma_f32(p, t, set1_f32(1.935403996e-1f));
  p = fma_f32(p, t, set1_f32(1.128379140f));
  VF q = set1_f32(3.742028779e-5f);
  q = fma_f32(q, t, set1_f32(1.185522300e-3f));
  q = fma_f32(q, t, set1_f32(1.520685043e-2f));
  q = fma_f32(q, t, set1_f32(1.153480709e-1f));
  q = fma_f32(q, t, set1_f32(5.048532705e-1f));
  q = fma_f32(q, t, set1_f32(1.0f));
  const VF one = set1_f32(1.0f), minus_one = set1_f32(-1.0f);
  VF r = min_f32(one, max_f32(minus_one, div_f32(mul_f32(x, p), q)));
  VF end = select_less(x, zero_f32(), minus_one, one);
  return select_less(set1_f32(4.0f), abs_f32(x), end, r);
}

// x (1 + erf(x / sqrt 2)) / 2
static inline VF gelu_f32(VF x) {
  VF half = mul_f32(x, set1_f32(0.5f));
  return fma_f32(half, erf_f32(mul_f32(x, set1_f32(0.707106781f))), half);
}

// x (1 + tanh u) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), as x / (1 + e^(-2u)): the same, but without 1 + tanh
// cancelling where x is negative.
static inline VF gelu_tanh_f32(VF x) {
  VF cube = mul_f32(mul_f32(x, x), mul_f32(x, set1_f32(0.044715f)));
  VF u = mul_f32(add_f32(x, cube), set1_f32(-1.59576912f));
  return div_f32(x, add_f32(exp_f32(u), set1_f32(1.0f)));
}

// qlm_activation; NaN stays NaN in all of them.
static inline VF activate_vector(int32_t activation, VF x) {
  if (activation == QLM_RELU) return max_f32(zero_f32(), x);
  if (activation == QLM_GELU) return gelu_f32(x);
  if (activation == QLM_GELU_TANH) return gelu_tanh_f32(x);
  return x;
}

}  // namespace QLM_ISA
}  // namespace qlm
