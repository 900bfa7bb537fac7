/* Rows of the embedding table, as float32. */
#include "kernels.h"
#include "weights.h"

typedef struct {
    const int64_t *ids;
    const void *table;
    float *out;
    long m, stride, n;
    int type;
    float scale;
} embedding_t;

INLINE void embed(const char *row, int type, long n, float scale, float *out) {
    long i = 0;
    for (; i + LANES <= n; i += LANES) store(out + i, weights_at(row, type, i) * scale);
    for (; i < n; i++) out[i] = weight_at(row, type, i) * scale;
}

static void embedding_chunk(const void *arg, long chunk) {
    const embedding_t *job = arg;
    long last = (chunk + 1) * ROWS_PER_CHUNK < job->m ? (chunk + 1) * ROWS_PER_CHUNK : job->m;
    for (long i = chunk * ROWS_PER_CHUNK; i < last; i++) {
        const char *row = (const char *)job->table + job->ids[i] * job->stride * size_of(job->type);
        float *out = job->out + i * job->n;
        if (job->type == F32) embed(row, F32, job->n, job->scale, out);
        else if (job->type == F16) embed(row, F16, job->n, job->scale, out);
        else embed(row, BF16, job->n, job->scale, out);
    }
}

void embedding(const int64_t *ids, long m, const void *table, long stride, int type, long n, float scale,
               float *out) {
    embedding_t job = {.ids = ids, .table = table, .out = out, .m = m, .stride = stride, .n = n, .type = type,
                       .scale = scale};
    parallel(embedding_chunk, &job, (m + ROWS_PER_CHUNK - 1) / ROWS_PER_CHUNK);
}
