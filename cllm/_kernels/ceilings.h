/* Independent chains of multiply-adds that never leave the registers: how fast the machine can multiply at all.
 *
 * 12 chains of 64-byte vectors hide the latency of 4 cycles on every CPU with one or two units; AVX2's 16
 * registers hold 12 sums and the two operands; SSE2 multiplies and adds apart and needs registers in between.
 */
#ifndef CLLM_CEILINGS_H
#define CLLM_CEILINGS_H
#include <stddef.h>
#include "tile.h"

#if defined(__FMA__) || defined(__aarch64__)
#define CLLM_CHAINS 12
#else
#define CLLM_CHAINS 8
#endif
#define CLLM_CHAIN_LANES ((ptrdiff_t)(CLLM_VBYTES / sizeof(float)))
/* A multiplication and an addition for each lane of each chain. */
#define CLLM_CHAIN_FLOPS (2 * CLLM_CHAINS * CLLM_CHAIN_LANES)

/* Each chain is x = x a + b; the sum of all lanes keeps the compiler from leaving the work out. */
static inline float cllm_fma_chains(ptrdiff_t n, float a, float b) {
    vec_f32 x[CLLM_CHAINS];
    float total = 0;
#pragma GCC unroll 16
    for (int i = 0; i < CLLM_CHAINS; i++)
        x[i] = (vec_f32){0} + (float)i;
    for (; n > 0; n--) {
#pragma GCC unroll 16
        for (int i = 0; i < CLLM_CHAINS; i++)
            x[i] = x[i] * a + b;
    }
#pragma GCC unroll 16
    for (int i = 0; i < CLLM_CHAINS; i++)
        for (ptrdiff_t j = 0; j < CLLM_CHAIN_LANES; j++)
            total += x[i][j];
    return total;
}
#endif
