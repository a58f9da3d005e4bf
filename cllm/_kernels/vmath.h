/* exp, tanh and GELU as straight-line code that the compiler vectorises when it inlines them into a loop.
 *
 * Rounding to an integer is done by adding and subtracting 1.5 * 2^23, which every vector unit can do
 * (SSE2 has no rounding instruction). Products and sums are written a * b + c: with -ffp-contract=fast they
 * become fused multiply-adds where the CPU has them, and stay vectorised where it has not (fmaf() would
 * be a library call there).
 */
#ifndef CLLM_VMATH_H
#define CLLM_VMATH_H
#include <math.h>
#include <stdint.h>

#define CLLM_INLINE static inline __attribute__((always_inline))

/* t, whose last bits are n = x / ln(2) rounded, and p = e^(x - n ln(2)): Cody-Waite reduction to |r| <= ln(2)/2 and a
 * polynomial of degree 6. TYPE is float or a vector of floats. */
#define CLLM_EXP_PARTS(TYPE, x, t, p)                                                                       \
    const TYPE t = (x) * 1.44269504088896341f + 12582912.0f; /* 1.5 * 2^23 */                               \
    const TYPE t##_n = t - 12582912.0f;                                                                     \
    const TYPE t##_r = (x) - t##_n * 0.693359375f - t##_n * -2.12194440e-4f; /* n times the first is exact */ \
    TYPE p = 1.3981999507e-3f + t##_r * 1.9875691500e-4f;                                                   \
    p = p * t##_r + 8.3334519073e-3f;                                                                       \
    p = p * t##_r + 4.1665795894e-2f;                                                                       \
    p = p * t##_r + 1.6666665459e-1f;                                                                       \
    p = p * t##_r + 5.0000001201e-1f;                                                                       \
    p = p * (t##_r * t##_r) + t##_r + 1.0f

/* e^x with a relative error under 2e-7 on [-86.9, 88.7]; 0 below -86.99, infinity above 88.73; NaN stays
 * NaN. The bounds need no selection at the end: 2^(n-1) is 0 at the lower one, and at the upper one the result
 * overflows. */
CLLM_INLINE float cllm_expf(float x) {
    float c = x < -87.33654f ? -87.33654f : x;
    c = c > 89.0f ? 89.0f : c;
    CLLM_EXP_PARTS(float, c, t, p);
    union { float f; int32_t i; } u, half;
    u.f = t;
    /* 2^n as 2^(n-1) * 2: n = 128 does not fit an exponent */
    half.i = (int32_t)(((uint32_t)(u.i - 0x4b400000) + 126u) << 23);
    return p * half.f * 2.0f;
}

/* 2^x for x in [-126, 128], without bounds: two thirds of the operations of cllm_expf. Infinity from 127.5
 * on; NaN stays NaN. The polynomial is off by 2e-9. */
CLLM_INLINE float cllm_exp2f(float x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23 */
    const float t = x + magic;
    const float r = x - (t - magic);
    float p = 1.53533178e-4f * r + 1.33988744e-3f;
    p = p * r + 9.61843752e-3f;
    p = p * r + 5.55033247e-2f;
    p = p * r + 2.40226479e-1f;
    p = p * r + 6.93147203e-1f;
    p = p * r + 1.0f;
    union { float f; uint32_t i; } u;
    u.f = t;
    u.i = (u.i << 23) + 0x3f800000u;
    return p * u.f;
}

/* x Phi(x), with Phi the normal distribution function; 0 below -4 sqrt(2), where Phi is under 8e-9. Phi is
 * off by at most 2.5e-7: the rational function of erf (as in Eigen and XLA), with sqrt(1/2) and 1/2 in its
 * coefficients. */
CLLM_INLINE float cllm_geluf(float x) {
    float c = x > 5.656854f ? 5.656854f : x;
    c = c < -5.656854f ? -5.656854f : c;
    const float z = c * c;
    float p = 1.6542497674e-6f * z + -3.36255313845e-4f;
    p = p * z + 5.09968764475e-2f;
    p = p * z + 2.76341481492f;
    p = p * z + 71.3599197216f;
    p = p * z + 573.721613439f;
    p = p * z + 6251.02742051f;
    float q = z + 29.2974053029f;
    q = q * z + 462.122387454f;
    q = q * z + 4049.59099195f;
    q = q * z + 15669.0030935f;
    return x < -5.656854f ? 0.0f : x * (c * p / q + 0.5f);
}

/* Phi(x) + x Phi'(x) to 1.2e-7. For x < 0 it is e^(-x^2/2) times P(|x|) / Q(|x|), which is off by 1.6e-9
 * (a minimax fit), and 1 minus that for x > 0: one exponential serves both terms. */
CLLM_INLINE float cllm_gelu_slopef(float x) {
    float a = fabsf(x);
    a = a > 13.0f ? 13.0f : a;
    float p = -3.98507433e-1f * a + -2.64221091f;
    p = p * a + -6.04253145f;
    p = p * a + -3.53704937f;
    p = p * a + 7.32429423f;
    float q = a + 6.6042775f;
    q = q * a + 16.3016708f;
    q = q * a + 14.6485884f;
    const float y = cllm_exp2f(a * a * -0.72134752f) * p / q;
    return x > 0.0f ? 1.0f - y : y;
}

/* tanh(x) with a relative error under 3e-7 everywhere: x + x^3 p(x^2) below 0.625, a Chebyshev fit that is off
 * by 6e-10 and keeps the digits of a small x; else 1 - 2 / (e^2|x| + 1) with the sign of x. */
CLLM_INLINE float cllm_tanhf(float x) {
    const float a = fabsf(x);
    const float z = x * x;
    float p = 2.29274481618e-3f * z + -8.34394551584e-3f;
    p = p * z + 2.1768918651e-2f;
    p = p * z + -5.39592595772e-2f;
    p = p * z + 1.33333035569e-1f;
    p = p * z + -3.33333331721e-1f;
    const float near = x + x * (z * p);
    const float far = copysignf(1.0f - 2.0f / (cllm_expf(2.0f * a) + 1.0f), x);
    return a < 0.625f ? near : far;
}

/* float64 is for checking: right first, no speed bar. */
CLLM_INLINE double cllm_exp(double x) { return exp(x); }
CLLM_INLINE double cllm_exp2(double x) { return exp2(x); }
CLLM_INLINE double cllm_tanh(double x) { return tanh(x); }
CLLM_INLINE double cllm_normal_cdf(double x) { return 0.5 * (1.0 + erf(x * 0.7071067811865476)); }

CLLM_INLINE double cllm_gelu(double x) {
    return x < -10.0 ? 0.0 : x * cllm_normal_cdf(x);
}

CLLM_INLINE double cllm_gelu_slope(double x) {
    x = x < -10.0 ? -10.0 : x > 10.0 ? 10.0 : x;
    return cllm_normal_cdf(x) + x * 0.3989422804014327 * exp(-0.5 * x * x);
}

#endif
