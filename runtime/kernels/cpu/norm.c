/* RMSNorm, fused with the residual addition before it. */
#include "kernels.h"
#include "vectors.h"

#include <math.h>
#include <stddef.h>

typedef struct {
    const float *x, *weight;
    float *residual, *out;
    long m, n;
    float eps;
} norm_t;

static void add_rms_norm_chunk(const void *arg, long chunk) {
    const norm_t *job = arg;
    long last = (chunk + 1) * ROWS_PER_CHUNK < job->m ? (chunk + 1) * ROWS_PER_CHUNK : job->m;
    for (long row = chunk * ROWS_PER_CHUNK; row < last; row++) {
        const float *x = job->x ? job->x + row * job->n : NULL;
        float *residual = job->residual + row * job->n, *out = job->out + row * job->n;
        vf squares = {0};
        float total = 0;
        long i = 0;
        for (; i + LANES <= job->n; i += LANES) {
            vf v = load(residual + i);
            if (x) store(residual + i, v += load(x + i));
            squares += v * v;
        }
        for (; i < job->n; i++) {
            if (x) residual[i] += x[i];
            total += residual[i] * residual[i];
        }
        float scale = 1.0f / sqrtf((total + sum(squares)) / job->n + job->eps);
        for (i = 0; i + LANES <= job->n; i += LANES)
            store(out + i, load(residual + i) * scale * load(job->weight + i));
        for (; i < job->n; i++) out[i] = residual[i] * scale * job->weight[i];
    }
}

void add_rms_norm(const float *x, float *residual, const float *weight, float eps, long m, long n, float *out) {
    norm_t job = {.x = x, .residual = residual, .weight = weight, .eps = eps, .m = m, .n = n, .out = out};
    parallel(add_rms_norm_chunk, &job, (m + ROWS_PER_CHUNK - 1) / ROWS_PER_CHUNK);
}
