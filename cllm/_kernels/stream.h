/* Copies past the caches: what is written and not read again soon need not be read from memory before. */
#ifndef CLLM_STREAM_H
#define CLLM_STREAM_H
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <emmintrin.h>

static inline void cllm_stream(void *restrict y, const void *restrict x, size_t n)
{
    char *to = (char *)y;
    const char *from = (const char *)x;
    size_t head = (size_t)(-(uintptr_t)to & 15), i;
    head = head < n ? head : n;
    memcpy(to, from, head);
    for (i = head; i + 16 <= n; i += 16)
        _mm_stream_si128((__m128i *)(to + i), _mm_loadu_si128((const __m128i *)(from + i)));
    memcpy(to + i, from + i, n - i);
    _mm_sfence();   /* such stores are ordered by this alone */
}
#else
static inline void cllm_stream(void *restrict y, const void *restrict x, size_t n) { memcpy(y, x, n); }
#endif
#endif
