/* Scratch memory for packed operands: one grow-only block for each calling thread, freed when it ends.
 * Kernels are not re-entrant on a thread, so a call may use all of it; nothing in it survives a call. */
#ifndef CLLM_SCRATCH_H
#define CLLM_SCRATCH_H
#include <pthread.h>
#include <stdlib.h>

static pthread_key_t cllm_scratch_key;
static pthread_once_t cllm_scratch_once = PTHREAD_ONCE_INIT;
static __thread void *cllm_scratch_block;
static __thread size_t cllm_scratch_size;

static void cllm_scratch_make_key(void) { pthread_key_create(&cllm_scratch_key, free); }

/* At least `bytes` bytes, 64-byte aligned; NULL when there is no memory. */
static void *cllm_scratch(size_t bytes) {
    if (bytes > cllm_scratch_size) {
        void *block = NULL;
        pthread_once(&cllm_scratch_once, cllm_scratch_make_key);
        if (posix_memalign(&block, 64, bytes) != 0) return NULL;
        free(cllm_scratch_block);
        cllm_scratch_block = block;
        cllm_scratch_size = bytes;
        pthread_setspecific(cllm_scratch_key, block);
    }
    return cllm_scratch_block;
}
#endif
