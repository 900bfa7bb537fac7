/* The gated activation of the MLP. */
#include "kernels.h"
#include "vectors.h"

#include <math.h>

typedef struct {
    const float *x;
    float *out;
    long m, n;
} gated_t;

static void silu_mul_chunk(const void *arg, long chunk) {
    const gated_t *job = arg;
    long last = (chunk + 1) * ROWS_PER_CHUNK < job->m ? (chunk + 1) * ROWS_PER_CHUNK : job->m;
    for (long row = chunk * ROWS_PER_CHUNK; row < last; row++) {
        const float *gate = job->x + row * 2 * job->n, *up = gate + job->n;
        float *out = job->out + row * job->n;
        long i = 0;
        for (; i + LANES <= job->n; i += LANES) {
            vf g = load(gate + i);
            store(out + i, g / (1.0f + exp_lanes(-g)) * load(up + i));
        }
        for (; i < job->n; i++) out[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
    }
}

void silu_mul(const float *x, long m, long n, float *out) {
    gated_t job = {.x = x, .m = m, .n = n, .out = out};
    parallel(silu_mul_chunk, &job, (m + ROWS_PER_CHUNK - 1) / ROWS_PER_CHUNK);
}
