/* linear: y[m, n] = x[m, k] . w[n, k]^T (+ bias), w in up to three parts stacked along n.
 *
 * Activations are float32. Weights are read row by row where the checkpoint is mapped, in its own format,
 * so nothing is packed at start. Every path below adds up a row in the same order (lane by lane over K_BLOCK
 * elements, the lanes, the tail, then the blocks), so a row of y has the same bits whatever else is in the
 * batch. That order allows one accumulator a row, which costs a single stream about a sixth of its speed and
 * buys reproducible answers. */
#include "weights.h"

#include <math.h>

#define MAX_PARTS 3
#define K_BLOCK 1024
#define M_BLOCK 96
#define STREAMED_ROWS 16 /* with more rows of x than this, weights are widened once for the whole block */

typedef struct {
    const void *weight;
    long rows, stride; /* stride between rows, in elements */
    const float *bias;
} part_t;

typedef struct {
    const float *x;
    float *y;
    long m, k, ldy, n;
    int type, parts;
    part_t part[MAX_PARTS];
    long rows_per_chunk, chunks_per_block;
} linear_t;

/* One row of weights, streamed from memory, against C rows of x: out[c * ldy] = w . x[c] + bias. */
#define STREAM(C)                                                                                                  \
    INLINE void stream_##C(const char *w, int type, const float *x, long k, float *out, long ldy, float bias) {    \
        const long size = type == F32 ? 4 : 2;                                                                     \
        for (long from = 0; from < k; from += K_BLOCK) {                                                           \
            const long to = k - from < K_BLOCK ? k : from + K_BLOCK;                                               \
            vf acc[C] = {{0}};                                                                                     \
            long i = from;                                                                                         \
            for (; i + 4 * LANES <= to; i += 4 * LANES) {                                                          \
                __builtin_prefetch(w + i * size + 4096);                                                           \
                for (long j = i; j < i + 4 * LANES; j += LANES) {                                                  \
                    vf ws = weights_at(w, type, j);                                                                \
                    for (int c = 0; c < C; c++) acc[c] += ws * load(x + c * k + j);                                \
                }                                                                                                  \
            }                                                                                                      \
            for (; i + LANES <= to; i += LANES) {                                                                  \
                vf ws = weights_at(w, type, i);                                                                    \
                for (int c = 0; c < C; c++) acc[c] += ws * load(x + c * k + i);                                    \
            }                                                                                                      \
            for (int c = 0; c < C; c++) {                                                                          \
                float total = sum(acc[c]);                                                                         \
                for (long j = i; j < to; j++) total = fmaf(weight_at(w, type, j), x[c * k + j], total);                       \
                out[c * ldy] = total + (from ? out[c * ldy] : bias);                                               \
            }                                                                                                      \
        }                                                                                                          \
    }
STREAM(1)
STREAM(2)
STREAM(3)
STREAM(4)
STREAM(5)
STREAM(6)
STREAM(7)
STREAM(8)

/* Four rows of float32 weights, K_BLOCK apart, against C rows of x over k elements. `add` is for all but the
 * first stretch of a longer row. */
#define TILE(C)                                                                                                    \
    INLINE void tile_##C(const float *w, const float *x, long ldx, long k, float *out, long ldy, v4 bias, int add) { \
        vf acc[4][C] = {{{0}}};                                                                                    \
        long i = 0;                                                                                                \
        for (; i + LANES <= k; i += LANES) {                                                                       \
            vf xs[C];                                                                                              \
            for (int c = 0; c < C; c++) xs[c] = load(x + c * ldx + i);                                             \
            for (int r = 0; r < 4; r++) {                                                                          \
                vf ws = load(w + r * K_BLOCK + i);                                                                 \
                for (int c = 0; c < C; c++) acc[r][c] += ws * xs[c];                                               \
            }                                                                                                      \
        }                                                                                                          \
        for (int c = 0; c < C; c++) {                                                                              \
            v4 total = sum4(acc[0][c], acc[1][c], acc[2][c], acc[3][c]);                                           \
            for (long j = i; j < k; j++)                                                                           \
                for (int r = 0; r < 4; r++) total[r] = fmaf(w[r * K_BLOCK + j], x[c * ldx + j], total[r]);                       \
            v4 *at = (v4 *)(out + c * ldy);                                                                        \
            *at = total + (add ? *at : bias);                                                                      \
        }                                                                                                          \
    }
TILE(1)
TILE(2)
TILE(3)

/* Four rows of weights, from the width they are stored in to float32, K_BLOCK apart. */
INLINE void widen(const void *w, int type, long stride, long k, float *out) {
    const long size = type == F32 ? 4 : 2;
    for (int r = 0; r < 4; r++) {
        const char *row = (const char *)w + r * stride * size;
        long i = 0;
        for (; i + LANES <= k; i += LANES) {
            __builtin_prefetch(row + (i + stride * 4) * size);
            store(out + r * K_BLOCK + i, weights_at(row, type, i));
        }
        for (; i < k; i++) out[r * K_BLOCK + i] = weight_at(row, type, i);
    }
}

/* Four rows of weights against m rows of x. */
INLINE void four_rows(const linear_t *job, int type, const part_t *part, long n, const float *x, long m, float *y) {
    const long size = type == F32 ? 4 : 2, k = job->k, ldy = job->ldy;
    const char *w = (const char *)part->weight + n * part->stride * size;
    const v4 bias = part->bias ? *(const v4 *)(part->bias + n) : (v4){0};
    float wide[4 * K_BLOCK] __attribute__((aligned(64)));
    for (long at = 0; at < k; at += K_BLOCK) {
        long len = k - at < K_BLOCK ? k - at : K_BLOCK, c = 0;
        widen(w + at * size, type, part->stride, len, wide);
        for (; c + 3 <= m; c += 3) tile_3(wide, x + c * k + at, k, len, y + c * ldy, ldy, bias, at > 0);
        if (m - c == 2) tile_2(wide, x + c * k + at, k, len, y + c * ldy, ldy, bias, at > 0);
        if (m - c == 1) tile_1(wide, x + c * k + at, k, len, y + c * ldy, ldy, bias, at > 0);
    }
}

INLINE void one_row(const linear_t *job, int type, const part_t *part, long n, const float *x, long m, float *y) {
    const long k = job->k, ldy = job->ldy;
    const char *w = (const char *)part->weight + n * part->stride * (type == F32 ? 4 : 2);
    const float bias = part->bias ? part->bias[n] : 0.0f;
    for (; m >= 8; m -= 8, x += 8 * k, y += 8 * ldy) stream_8(w, type, x, k, y, ldy, bias);
    switch (m) {
    case 7: stream_7(w, type, x, k, y, ldy, bias); break;
    case 6: stream_6(w, type, x, k, y, ldy, bias); break;
    case 5: stream_5(w, type, x, k, y, ldy, bias); break;
    case 4: stream_4(w, type, x, k, y, ldy, bias); break;
    case 3: stream_3(w, type, x, k, y, ldy, bias); break;
    case 2: stream_2(w, type, x, k, y, ldy, bias); break;
    case 1: stream_1(w, type, x, k, y, ldy, bias); break;
    }
}

INLINE void linear_rows(const linear_t *job, int type, const part_t *part, long first, long last, long column,
                        long row0, long m) {
    const float *x = job->x + row0 * job->k;
    float *y = job->y + row0 * job->ldy + column;
    long n = first;
    if (m > STREAMED_ROWS)
        for (; n + 4 <= last; n += 4) four_rows(job, type, part, n, x, m, y + n);
    for (; n < last; n++) one_row(job, type, part, n, x, m, y + n);
}

static void linear_chunk(const void *arg, long chunk) {
    const linear_t *job = arg;
    long row0 = chunk / job->chunks_per_block * M_BLOCK;
    long m = job->m - row0 < M_BLOCK ? job->m - row0 : M_BLOCK;
    long first = chunk % job->chunks_per_block * job->rows_per_chunk;
    long last = first + job->rows_per_chunk < job->n ? first + job->rows_per_chunk : job->n;
    for (long p = 0, base = 0; p < job->parts; base += job->part[p++].rows) {
        const part_t *part = &job->part[p];
        long from = first > base ? first - base : 0, to = last - base < part->rows ? last - base : part->rows;
        if (from >= to) continue;
        if (job->type == F32) linear_rows(job, F32, part, from, to, base, row0, m);
        else if (job->type == F16) linear_rows(job, F16, part, from, to, base, row0, m);
        else linear_rows(job, BF16, part, from, to, base, row0, m);
    }
}

EXPORT void linear(const float *x, long m, long k, float *y, long ldy, int type, int parts, const part_t *part) {
    linear_t job = {.x = x, .y = y, .m = m, .k = k, .ldy = ldy, .type = type, .parts = parts};
    for (int p = 0; p < parts; p++) job.part[p] = part[p], job.n += part[p].rows;
    if (m == 0) return;
    long blocks = (m + M_BLOCK - 1) / M_BLOCK, threads = num_threads();
    long rows = job.n / (threads * 8 * (blocks > 4 ? 1 : 4 / blocks)) & ~7L;
    job.rows_per_chunk = rows < 8 ? 8 : rows > 256 ? 256 : rows;
    job.chunks_per_block = (job.n + job.rows_per_chunk - 1) / job.rows_per_chunk;
    parallel(linear_chunk, &job, blocks * job.chunks_per_block);
}
