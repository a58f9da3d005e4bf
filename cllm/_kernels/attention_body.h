/* Included by attention.h once for each REAL (float, double) and INT of its size; SUFFIX names the results. */
#define NAME(x) CLLM_CAT(x, SUFFIX)
#define WIDTH ((ptrdiff_t)(CLLM_VBYTES / sizeof(REAL)))
#define GROUPS ((int)(CLLM_LANES / WIDTH))
#define LOAD(p) (*(const NAME(vecu) *)(p))
#define STORE(p, v) (*(NAME(vecu) *)(p) = (v))
#define SELECT(mask, a, b) ((NAME(vec))(((mask) & (NAME(bits))(a)) | (~(mask) & (NAME(bits))(b))))

/* All bits of the first n lanes, none of the others. */
static inline NAME(bits) NAME(first)(ptrdiff_t n)
{
    NAME(bits) at;
    for (int i = 0; i < (int)WIDTH; i++)
        at[i] = i;
    return at < (INT)n;
}

static inline REAL NAME(lanes_largest)(const NAME(vec) *v)
{
    REAL lane[CLLM_LANES];
    for (int i = 0; i < GROUPS; i++)
        STORE(lane + i * WIDTH, v[i]);
    for (int k = 0; k < 16; k++)
        lane[k] = lane[k + 16] > lane[k] ? lane[k + 16] : lane[k];
    for (int k = 0; k < 8; k++)
        lane[k] = lane[k + 8] > lane[k] ? lane[k + 8] : lane[k];
    for (int k = 0; k < 4; k++)
        lane[k] = lane[k + 4] > lane[k] ? lane[k + 4] : lane[k];
    for (int k = 1; k < 4; k++)
        lane[0] = lane[k] > lane[0] ? lane[k] : lane[0];
    return lane[0];
}

/* s[:n] = exp(s - max), s[n:end] = 0.  Writes max and returns the sum.  n >= 1.
 * s has room for n rounded up to whole lanes. */
static inline REAL NAME(cllm_softmax_row)(REAL *s, ptrdiff_t n, ptrdiff_t end, REAL *max)
{
    const ptrdiff_t whole = (n + CLLM_LANES - 1) / CLLM_LANES * CLLM_LANES;
    NAME(vec) top[CLLM_LANES / WIDTH], total[CLLM_LANES / WIDTH];
    const NAME(vec) lowest = (NAME(vec)){0} - (REAL)INFINITY;
#pragma GCC unroll 16
    for (int i = 0; i < GROUPS; i++) {
        REAL *last = s + whole - CLLM_LANES + i * WIDTH;
        STORE(last, SELECT(NAME(first)(n - (last - s)), LOAD(last), lowest));
        top[i] = lowest;
        total[i] = (NAME(vec)){0};
    }
    for (ptrdiff_t j = 0; j < whole; j += CLLM_LANES)
#pragma GCC unroll 16
        for (int i = 0; i < GROUPS; i++) {
            const NAME(vec) v = LOAD(s + j + i * WIDTH);
            top[i] = SELECT(v > top[i], v, top[i]);
        }
    const REAL largest = NAME(lanes_largest)(top);
    const REAL base = largest == -(REAL)INFINITY ? 0 : largest; /* all are: the sum is 0 */
    for (ptrdiff_t j = 0; j < whole; j += CLLM_LANES)
#pragma GCC unroll 16
        for (int i = 0; i < GROUPS; i++) {
            const NAME(vec) v = NAME(exp_below)(LOAD(s + j + i * WIDTH) - base);
            STORE(s + j + i * WIDTH, v);
            total[i] += v;
        }
    for (ptrdiff_t j = whole; j < end; j++)
        s[j] = 0;
    *max = largest;
    return NAME(lanes_total)(total, s, 0);
}

/* p[:n] = exp(p - lse), s[:n] = p (s - delta): scores to probabilities and dP to dS; zeros from n to end.
 * Both have room for n rounded up to whole lanes. */
static inline void NAME(cllm_score_gradients)(REAL *p, REAL *s, ptrdiff_t n, ptrdiff_t end, REAL lse, REAL delta)
{
    const ptrdiff_t whole = (n + CLLM_LANES - 1) / CLLM_LANES * CLLM_LANES;
    for (ptrdiff_t j = 0; j < whole; j += WIDTH) {
        const NAME(bits) seen = NAME(first)(n - j);
        const NAME(vec) v = (NAME(vec))(seen & (NAME(bits))NAME(exp_below)(LOAD(p + j) - lse));
        STORE(p + j, v);
        STORE(s + j, (NAME(vec))(seen & (NAME(bits))(v * (LOAD(s + j) - delta))));
    }
    for (ptrdiff_t j = whole; j < end; j++)
        p[j] = s[j] = 0;
}

/* y (T, width) = scale * x (T, D), row stride ld, zeros beyond D.  Returns whether y has no NaN and no infinity.
 * width: D rounded up to whole vectors. */
static inline int NAME(cllm_pack_finite)(
    const REAL *restrict x, ptrdiff_t ld, ptrdiff_t T, ptrdiff_t D, ptrdiff_t width, REAL scale, REAL *restrict y)
{
    NAME(bits) wrong = {0}; /* x - x has no bit for a finite x */
    for (ptrdiff_t t = 0; t < T; t++, x += ld, y += width) {
        ptrdiff_t c = 0;
        for (; c + WIDTH <= D; c += WIDTH) {
            const NAME(vec) v = LOAD(x + c) * scale;
            STORE(y + c, v);
            wrong |= (NAME(bits))(v - v);
        }
        if (c < width) {
            NAME(vec) v = {0};
            for (ptrdiff_t i = 0; i < D - c; i++)
                v[i] = x[c + i] * scale;
            STORE(y + c, v);
            wrong |= (NAME(bits))(v - v);
        }
    }
    INT any = 0;
    for (int i = 0; i < (int)WIDTH; i++)
        any |= wrong[i];
    return any == 0;
}

#undef NAME
#undef WIDTH
#undef GROUPS
#undef LOAD
#undef STORE
#undef SELECT
