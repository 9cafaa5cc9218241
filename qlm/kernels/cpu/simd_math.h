// exp, erf and the activations on W lanes, from polynomials, so that no vector library is needed.
//
// The coefficients are minimax fits made for this file, by Remez exchange with 40 digits, and rounded to float32
// afterwards. Each comment gives the fit's largest error before that rounding.
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

// erf(x) to 1e-7 absolute, odd, exactly +-1 from |x| = 4 on, NaN for NaN.
static inline VF erf_f32(VF x) {
  VF a = min_f32(set1_f32(4.0f), abs_f32(x));  // a NaN goes through
  // Up to 0.93: a + a P(a^2), 1.7e-8 of erf.
  VF t = mul_f32(a, a);
  VF p = set1_f32(-5.95374184734e-4f);
  p = fma_f32(p, t, set1_f32(4.98594063393e-3f));
  p = fma_f32(p, t, set1_f32(-2.67617198973e-2f));
  p = fma_f32(p, t, set1_f32(1.12816825420e-1f));
  p = fma_f32(p, t, set1_f32(-3.76124811002e-1f));
  p = fma_f32(p, t, set1_f32(1.28379147691e-1f));
  p = fma_f32(p, a, a);
  // From 0.93 to 4: 1 - e^Q(a), Q fitted to log(erfc(a)) so that the result is 1.5e-9 off at most.
  VF q = set1_f32(1.94945735493e-4f);
  q = fma_f32(q, a, set1_f32(-3.03368305943e-3f));
  q = fma_f32(q, a, set1_f32(2.21897419587e-2f));
  q = fma_f32(q, a, set1_f32(-1.03856306893e-1f));
  q = fma_f32(q, a, set1_f32(-6.37265824295e-1f));
  q = fma_f32(q, a, set1_f32(-1.12762736051f));
  q = fma_f32(q, a, set1_f32(-2.07017609994e-4f));
  q = sub_f32(set1_f32(1.0f), exp_f32(q));
  VF r = select_less(a, set1_f32(0.93f), p, q);
  return bits_f32(or_i32(bits_i32(r), and_i32(bits_i32(x), set1_i32(INT32_MIN))));
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
