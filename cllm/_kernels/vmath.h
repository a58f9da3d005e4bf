/* exp, erf and tanh as straight-line code that the compiler vectorises when it inlines them into a loop.
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

/* e^x with a relative error under 2e-7 on [-87, 88]; 0 below -87.34 (the smallest normal number), infinity
 * above 88.73; NaN stays NaN. Cody-Waite reduction to |r| <= ln(2)/2 and a polynomial of degree 6. */
CLLM_INLINE float cllm_expf(float x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23 */
    float c = x < -87.33654f ? -87.33654f : x;
    c = c > 88.72283f ? 88.72283f : c;
    const float t = c * 1.44269504088896341f + magic;
    const float n = t - magic;
    /* ln(2) in two parts; n times the first is exact */
    float r = c - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    float p = 1.3981999507e-3f + r * 1.9875691500e-4f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    union { float f; int32_t i; } u, half;
    u.f = t;
    /* 2^n as 2^(n-1) * 2: n = 128 does not fit an exponent */
    half.i = (int32_t)(((uint32_t)(u.i - 0x4b400000) + 126u) << 23);
    float y = p * half.f * 2.0f;
    y = x < -87.33654f ? 0.0f : y;
    y = x > 88.72283f ? INFINITY : y;
    return x == x ? y : x;
}

/* erf(x) with an error under 2.5e-7: a rational function of x^2 on [-4, 4], +-1 beyond (erf(4) = 1 - 1.5e-8).
 * Coefficients of the classic single-precision rational approximation (as in Eigen and XLA). */
CLLM_INLINE float cllm_erff(float x) {
    float c = x > 4.0f ? 4.0f : x;
    c = c < -4.0f ? -4.0f : c;
    const float z = c * c;
    float p = -2.72614225801306e-10f * z + 2.77068142495902e-08f;
    p = p * z + -2.10102402082508e-06f;
    p = p * z + -5.69250639462346e-05f;
    p = p * z + -7.34990630326855e-04f;
    p = p * z + -2.95459980854025e-03f;
    p = p * z + -1.60960333262415e-02f;
    float q = -1.45660718464996e-05f * z + -2.13374055278905e-04f;
    q = q * z + -1.68282697438203e-03f;
    q = q * z + -7.37332916720468e-03f;
    q = q * z + -1.42647390514189e-02f;
    return c * p / q;
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
CLLM_INLINE double cllm_erf(double x) { return erf(x); }
CLLM_INLINE double cllm_tanh(double x) { return tanh(x); }

#endif
