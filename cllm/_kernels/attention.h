/* Rows of scores and packing for attention, with maxima and sums in vector registers. As in lanes.pxd, element
 * j of a row goes to lane j % 32, and the lanes are combined by halves: a result depends on the row alone. */
#ifndef CLLM_ATTENTION_H
#define CLLM_ATTENTION_H
#include "norm.h" /* lanes_total */
#include "vmath.h"

typedef int32_t bits_f32 __attribute__((vector_size(CLLM_VBYTES)));
typedef int64_t bits_f64 __attribute__((vector_size(CLLM_VBYTES)));

/* e^x for x <= 0 as in rows.pxd, lane by lane. */
static inline vec_f32 exp_below_f32(vec_f32 x)
{
    CLLM_EXP_PARTS(vec_f32, x, t, p);
    p *= (vec_f32)(((bits_f32)t << 23) + 0x3f800000);
    return (vec_f32)((bits_f32)p & ~(x < -87.33654f));
}

static inline vec_f64 exp_below_f64(vec_f64 x)
{
    for (int i = 0; i < (int)(CLLM_VBYTES / sizeof(double)); i++)
        x[i] = exp(x[i]);
    return x;
}

#define REAL float
#define INT int32_t
#define SUFFIX f32
#include "attention_body.h"
#undef REAL
#undef INT
#undef SUFFIX

#define REAL double
#define INT int64_t
#define SUFFIX f64
#include "attention_body.h"
#undef REAL
#undef INT
#undef SUFFIX
#endif
