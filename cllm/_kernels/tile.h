/* The micro-kernel of all matrix products: C = A B (+ add) (+ bias) for one register tile.
 *
 * A tile is up to CLLM_MR rows by CLLM_NV vectors: all its sums stay in registers while k runs, and each
 * is one chain of multiply-adds in the order of k, whatever the tile's size. So an element has the same bits
 * wherever a tile or a thread's slice begins.
 *
 *   instruction set   vector   tile (float32)   registers for sums
 *   AVX-512           64 B     6 x 64           24 of 32
 *   AVX2              32 B     6 x 16           12 of 16
 *   NEON              16 B     6 x 16           24 of 32
 *   SSE2              16 B     4 x 8             8 of 16
 */
#ifndef CLLM_TILE_H
#define CLLM_TILE_H
#include <stddef.h>

#if defined(__AVX512F__)
#define CLLM_VBYTES 64
#define CLLM_MR 6
#define CLLM_NV 4
#elif defined(__AVX2__)
#define CLLM_VBYTES 32
#define CLLM_MR 6
#define CLLM_NV 2
#elif defined(__aarch64__)
#define CLLM_VBYTES 16
#define CLLM_MR 6
#define CLLM_NV 4
#else
#define CLLM_VBYTES 16
#define CLLM_MR 4
#define CLLM_NV 2
#endif

#define CLLM_CAT_(a, b) a##_##b
#define CLLM_CAT(a, b) CLLM_CAT_(a, b)

#define REAL float
#define SUFFIX f32
#include "tile_body.h"
#undef REAL
#undef SUFFIX

#define REAL double
#define SUFFIX f64
#include "tile_body.h"
#undef REAL
#undef SUFFIX
#endif
