/* Included by norm.h once for each REAL (float, double); SUFFIX names the results. */
#define NAME(x) CLLM_CAT(x, SUFFIX)
#define WIDTH ((ptrdiff_t)(CLLM_VBYTES / sizeof(REAL)))
#define GROUPS (CLLM_LANES * sizeof(REAL) / CLLM_VBYTES)
#define LOAD(p) (*(const NAME(vecu) *)(p))

typedef REAL NAME(eight) __attribute__((vector_size(8 * sizeof(REAL))));
typedef REAL NAME(four) __attribute__((vector_size(4 * sizeof(REAL))));

/* The sum of the lanes, after rest (n_rest < 32) is added to the first of them. */
static inline REAL NAME(lanes_total)(const NAME(vec) *sums, const REAL *rest, ptrdiff_t n_rest)
{
    union {
        NAME(vec) vecs[GROUPS];
        NAME(eight) eights[4];
        REAL lane[CLLM_LANES];
    } all;
#pragma GCC unroll 16
    for (int i = 0; i < (int)GROUPS; i++)
        all.vecs[i] = sums[i];
    for (ptrdiff_t k = 0; k < n_rest; k++)
        all.lane[k] += rest[k];
    union {
        NAME(eight) eight;
        NAME(four) fours[2];
    } half = {(all.eights[0] + all.eights[2]) + (all.eights[1] + all.eights[3])};
    const NAME(four) q = half.fours[0] + half.fours[1];
    return (q[0] + q[2]) + (q[1] + q[3]);
}

/* The sum of x - mean, x being (C). */
static inline REAL NAME(cllm_row_sum)(const REAL *restrict x, REAL mean, ptrdiff_t C)
{
    NAME(vec) a[GROUPS] = {0};
    REAL left[CLLM_LANES];
    ptrdiff_t j = 0;
    for (; j + CLLM_LANES <= C; j += CLLM_LANES)
#pragma GCC unroll 16
        for (int i = 0; i < (int)GROUPS; i++)
            a[i] += LOAD(x + j + i * WIDTH) - mean;
    for (ptrdiff_t k = 0; k < C - j; k++)
        left[k] = x[j + k] - mean;
    return NAME(lanes_total)(a, left, C - j);
}

/* The sum of (x - mean - rest)^2. */
static inline REAL NAME(cllm_row_squares)(const REAL *restrict x, REAL mean, REAL rest, ptrdiff_t C)
{
    NAME(vec) a[GROUPS] = {0};
    REAL left[CLLM_LANES];
    ptrdiff_t j = 0;
    for (; j + CLLM_LANES <= C; j += CLLM_LANES)
#pragma GCC unroll 16
        for (int i = 0; i < (int)GROUPS; i++) {
            const NAME(vec) d = LOAD(x + j + i * WIDTH) - mean - rest;
            a[i] += d * d;
        }
    for (ptrdiff_t k = 0; k < C - j; k++) {
        const REAL d = x[j + k] - mean - rest;
        left[k] = d * d;
    }
    return NAME(lanes_total)(a, left, C - j);
}

/* plain = sum(g), normed = sum(g (x - mean - rest)) with g = dy weight. */
static inline void NAME(cllm_row_products)(
    const REAL *restrict dy, const REAL *restrict x, const REAL *restrict weight, REAL mean, REAL rest,
    ptrdiff_t C, REAL *plain, REAL *normed)
{
    NAME(vec) a[GROUPS] = {0}, b[GROUPS] = {0};
    REAL g[CLLM_LANES], h[CLLM_LANES];
    ptrdiff_t j = 0;
    for (; j + CLLM_LANES <= C; j += CLLM_LANES)
#pragma GCC unroll 16
        for (int i = 0; i < (int)GROUPS; i++) {
            const ptrdiff_t at = j + i * WIDTH;
            const NAME(vec) v = LOAD(dy + at) * LOAD(weight + at);
            a[i] += v;
            b[i] += v * (LOAD(x + at) - mean - rest);
        }
    for (ptrdiff_t k = 0; k < C - j; k++) {
        g[k] = dy[j + k] * weight[j + k];
        h[k] = g[k] * (x[j + k] - mean - rest);
    }
    *plain = NAME(lanes_total)(a, g, C - j);
    *normed = NAME(lanes_total)(b, h, C - j);
}

/* With d = x - mean - rest: dx = rstd (dy weight - plain - d normed), and the row's part of the gradients of
 * weight and bias: dweight += dy d rstd, dbias += dy. */
static inline void NAME(cllm_row_backward)(
    const REAL *restrict dy, const REAL *restrict x, const REAL *restrict weight, REAL mean, REAL rest,
    REAL rstd, REAL plain, REAL normed, REAL *restrict dx, REAL *restrict dweight, REAL *restrict dbias,
    ptrdiff_t C)
{
#pragma GCC ivdep
    for (ptrdiff_t j = 0; j < C; j++) {
        const REAL d = x[j] - mean - rest;
        dx[j] = rstd * (dy[j] * weight[j] - plain - d * normed);
        dweight[j] += dy[j] * (d * rstd);
        dbias[j] += dy[j];
    }
}

#undef NAME
#undef WIDTH
#undef GROUPS
#undef LOAD
