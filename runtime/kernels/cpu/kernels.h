/* What the library can do. Matrices are row-major; sizes are in elements, strides between rows. */
#pragma once
#include "threads.h"

#include <stdint.h>

/* One stretch of rows of a linear layer's weights; `bias` may be null. */
typedef struct {
    const void *weight;
    long rows, stride;
    const float *bias;
} part_t;

/* Start threads - 1 workers; called once, before any kernel. */
EXPORT void start_threads(int threads);

/* out[m, n] = scale * table[ids[m], n]; the table's type is one of weights.h. */
EXPORT void embedding(const int64_t *ids, long m, const void *table, long stride, int type, long n, float scale,
                      float *out);

/* y[m, n] = x[m, k] . w[n, k]^T (+ bias), w in up to three parts stacked along n. */
EXPORT void linear(const float *x, long m, long k, float *y, long ldy, int type, int parts, const part_t *part);

/* residual[m, n] += x (unless x is null); out = residual / rms(residual) * weight */
EXPORT void add_rms_norm(const float *x, float *residual, const float *weight, float eps, long m, long n, float *out);

/* out[m, n] = silu(x[:, :n]) * x[:, n:] */
EXPORT void silu_mul(const float *x, long m, long n, float *out);

/* Rotate queries and keys in qkv[m, (heads + 2 kv_heads) * head_dim]; put keys and values where `slots` says. */
EXPORT void rotary_store(float *qkv, const float *cos_sin, const int64_t *positions, const int64_t *slots,
                         float *keys, float *values, long m, long heads, long kv_heads, long head_dim,
                         long rotary_dim, long block_size);

/* How many neighbouring queries one work item may hold for this many heads a kv head; 0: not supported. */
EXPORT int attention_tile(long group, long head_dim, long block_size);

/* Causal attention of qkv's queries over paged keys and values; items[num_items, 2] are sequence, first query. */
EXPORT void attention(const float *qkv, const float *keys, const float *values, float *out, const int32_t *tables,
                      long table_stride, const int32_t *query_start, const int32_t *seq_lens, const int32_t *items,
                      long num_items, long heads, long kv_heads, long head_dim, long block_size, float scale);
