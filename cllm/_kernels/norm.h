/* Rows of layer norm and RMS norm, with the sums kept in vector registers: GCC spills the lanes of a plain loop
 * to the stack at each turn. As in lanes.pxd, element j of a row goes to lane j % 32, and the lanes are
 * combined by halves: a row's result depends on the row alone. */
#ifndef CLLM_NORM_H
#define CLLM_NORM_H
#include "tile.h" /* the width of a vector */

#define CLLM_LANES 32

#define REAL float
#define SUFFIX f32
#include "norm_body.h"
#undef REAL
#undef SUFFIX

#define REAL double
#define SUFFIX f64
#include "norm_body.h"
#undef REAL
#undef SUFFIX
#endif
