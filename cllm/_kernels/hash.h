/* A counter-based random number: a hash of (key, index), so that dropout needs no state, draws the same
 * mask again in backward, and gives the same bits at any thread count.
 *
 * Arithmetic is on 32-bit integers, which every vector unit multiplies. A loop calls cllm_hash_high() once
 * and cllm_hash() for each element, over indices that do not cross a multiple of 2^32.
 */
#ifndef CLLM_HASH_H
#define CLLM_HASH_H
#include <stdint.h>

#define CLLM_HASH_INLINE static inline __attribute__((always_inline))

/* A bijection of 32-bit numbers with good avalanche (lowbias32, C. Wellons's search of hash functions). */
CLLM_HASH_INLINE uint32_t cllm_mix(uint32_t h) {
    h = (h ^ (h >> 16)) * 0x7feb352du;
    h = (h ^ (h >> 15)) * 0x846ca68bu;
    return h ^ (h >> 16);
}

/* What the key's high half and the index's high half contribute. */
CLLM_HASH_INLINE uint32_t cllm_hash_high(uint64_t key, uint64_t index) {
    return (uint32_t)(key >> 32) + (uint32_t)(index >> 32) * 0x9e3779b9u;
}

/* Uniform on 0..2^32-1; low is the index's low half. */
CLLM_HASH_INLINE uint32_t cllm_hash(uint64_t key, uint32_t high, uint32_t low) {
    return cllm_mix(cllm_mix(low ^ (uint32_t)key) ^ high);
}

#endif
