/* Rotary position embedding and the write into the paged cache.
 *
 * Keys are kept transposed within a block, [block, kv_head, head_dim, block_size], so that a query meets
 * neighbouring tokens in neighbouring lanes; values are [block, kv_head, block_size, head_dim]. */
#include "kernels.h"

#include <string.h>

typedef struct {
    float *qkv, *keys, *values;
    const float *cos_sin; /* [max_position, 2, rotary_dim / 2]: cosines, then sines */
    const int64_t *positions, *slots;
    long m, heads, kv_heads, head_dim, rotary_dim, block_size;
} rotary_t;

INLINE void rotate(float *head, const float *cos, const float *sin, long half) {
    for (long i = 0; i < half; i++) {
        float a = head[i], b = head[i + half];
        head[i] = a * cos[i] - b * sin[i];
        head[i + half] = b * cos[i] + a * sin[i];
    }
}

static void rotary_chunk(const void *arg, long chunk) {
    const rotary_t *job = arg;
    const long d = job->head_dim, half = job->rotary_dim / 2, size = job->block_size;
    long last = (chunk + 1) * ROWS_PER_CHUNK < job->m ? (chunk + 1) * ROWS_PER_CHUNK : job->m;
    for (long row = chunk * ROWS_PER_CHUNK; row < last; row++) {
        float *q = job->qkv + row * (job->heads + 2 * job->kv_heads) * d;
        float *k = q + job->heads * d, *v = k + job->kv_heads * d;
        const float *cos = job->cos_sin + job->positions[row] * job->rotary_dim, *sin = cos + half;
        for (long h = 0; h < job->heads + job->kv_heads; h++) rotate(q + h * d, cos, sin, half);
        long block = job->slots[row] / size, at = job->slots[row] % size;
        for (long h = 0; h < job->kv_heads; h++) {
            float *key = job->keys + (block * job->kv_heads + h) * d * size + at;
            for (long i = 0; i < d; i++) key[i * size] = k[h * d + i];
            memcpy(job->values + ((block * job->kv_heads + h) * size + at) * d, v + h * d, d * sizeof(float));
        }
    }
}

void rotary_store(float *qkv, const float *cos_sin, const int64_t *positions, const int64_t *slots, float *keys,
                  float *values, long m, long heads, long kv_heads, long head_dim, long rotary_dim, long block_size) {
    rotary_t job = {.qkv = qkv, .keys = keys, .values = values, .cos_sin = cos_sin, .positions = positions,
                    .slots = slots, .m = m, .heads = heads, .kv_heads = kv_heads, .head_dim = head_dim,
                    .rotary_dim = rotary_dim, .block_size = block_size};
    parallel(rotary_chunk, &job, (m + ROWS_PER_CHUNK - 1) / ROWS_PER_CHUNK);
}
