/* linear: y[m, n] = x[m, k] . w[n, k]^T (+ bias), w in up to three parts stacked along n.
 *
 * Activations are float32. Weights are read row by row where the checkpoint is mapped, in its own format,
 * so nothing is packed at start. Every path below adds up a row in the same order (lane by lane over K_BLOCK
 * elements, the lanes, the tail, then the blocks), so a row of y has the same bits whatever else is in the
 * batch. That order allows one accumulator a row; four rows at a time keep the processor busy all the same. */
#include "kernels.h"
#include "weights.h"

#include <math.h>
#include <stddef.h>

#define MAX_PARTS 3
#define K_BLOCK 1024
#define M_BLOCK 96
#define STREAMED_ROWS 8 /* with more rows of x than this, weights are widened once for the whole block */

typedef struct {
    const float *x;
    float *y;
    long m, k, ldy, n;
    int type, parts;
    part_t part[MAX_PARTS];
    long rows_per_chunk, chunks_per_block;
} linear_t;

/* R neighbouring rows of weights, `stride` bytes apart, against C rows of x, over a stretch of k elements: the first
 * stretch of a longer row unless `add`. Meanwhile the rows at `next`, unless null, are on their way. */
#define STEP(R, C, AT)                                                                                             \
    {                                                                                                              \
        vf xs[C];                                                                                                  \
        for (int c = 0; c < C; c++) xs[c] = load(x + c * ldx + (AT));                                              \
        for (int r = 0; r < R; r++) {                                                                              \
            vf ws = weights_at(w + r * stride, type, AT);                                                          \
            for (int c = 0; c < C; c++) acc[r][c] += ws * xs[c];                                                   \
        }                                                                                                          \
    }
#define TILE(R, C)                                                                                                 \
    INLINE void tile_##R##_##C(const char *w, int type, long stride, const char *next, const float *x, long ldx,   \
                               long k, float *y, long ldy, v4 bias, int add) {                                     \
        const long size = size_of(type), line = 64 / size;                                                         \
        vf acc[R][C] = {{{0}}};                                                                                    \
        long i = 0;                                                                                                \
        for (; next && i + line <= k; i += line) {                                                                 \
            for (int r = 0; r < R; r++) __builtin_prefetch(next + r * stride + i * size);                          \
            for (long j = i; j < i + line; j += LANES) STEP(R, C, j)                                               \
        }                                                                                                          \
        for (; i + LANES <= k; i += LANES) STEP(R, C, i)                                                           \
        for (int c = 0; c < C; c++) {                                                                              \
            v4 total = R == 4 ? sum4(acc[0][c], acc[1 % R][c], acc[2 % R][c], acc[3 % R][c])                       \
                              : (v4){sum(acc[0][c])};                                                              \
            for (long j = i; j < k; j++)                                                                           \
                for (int r = 0; r < R; r++)                                                                        \
                    total[r] = fmaf(weight_at(w + r * stride, type, j), x[c * ldx + j], total[r]);                 \
            float *at = y + c * ldy;                                                                               \
            if (R == 4) *(v4 *)at = total + (add ? *(v4 *)at : bias);                                              \
            else *at = total[0] + (add ? *at : bias[0]);                                                           \
        }                                                                                                          \
    }
TILE(1, 1)
TILE(1, 2)
TILE(1, 3)
TILE(4, 1)
TILE(4, 2)
TILE(4, 3)

/* The same against m rows of x; R is 1 or 4. */
INLINE void tiles(int R, const char *w, int type, long stride, const char *next, const float *x, long ldx, long m,
                  long k, float *y, long ldy, v4 bias, int add) {
    for (; m > 0; m -= 3, x += 3 * ldx, y += 3 * ldy, next = NULL) {
        if (R == 1 && m > 2) tile_1_3(w, type, stride, next, x, ldx, k, y, ldy, bias, add);
        else if (R == 1 && m == 2) tile_1_2(w, type, stride, next, x, ldx, k, y, ldy, bias, add);
        else if (R == 1) tile_1_1(w, type, stride, next, x, ldx, k, y, ldy, bias, add);
        else if (m > 2) tile_4_3(w, type, stride, next, x, ldx, k, y, ldy, bias, add);
        else if (m == 2) tile_4_2(w, type, stride, next, x, ldx, k, y, ldy, bias, add);
        else tile_4_1(w, type, stride, next, x, ldx, k, y, ldy, bias, add);
    }
}

/* Four rows of weights, from the width they are stored in to float32, K_BLOCK apart. */
INLINE void widen(const char *w, int type, long stride, const char *next, long k, float *out) {
    for (int r = 0; r < 4; r++, w += stride, next += stride, out += K_BLOCK) {
        long i = 0;
        for (; i + LANES <= k; i += LANES) {
            __builtin_prefetch(next + i * size_of(type));
            store(out + i, weights_at(w, type, i));
        }
        for (; i < k; i++) out[i] = weight_at(w, type, i);
    }
}

/* R rows of weights, of which the first is the n-th of its part, against m rows of x. */
INLINE void rows_of_y(int R, const linear_t *job, int type, const part_t *part, long n, const float *x, long m,
                      float *y) {
    const long size = size_of(type), k = job->k, stride = part->stride * size;
    const char *rows = (const char *)part->weight + n * stride;
    v4 bias = {0};
    if (part->bias) memcpy(&bias, part->bias + n, R * sizeof(float));
    for (long at = 0; at < k; at += K_BLOCK) {
        const long length = k - at < K_BLOCK ? k - at : K_BLOCK;
        const char *w = rows + at * size, *next = at + K_BLOCK < k ? w + K_BLOCK * size : rows + R * stride;
        if (m <= STREAMED_ROWS || R == 1) {
            tiles(R, w, type, stride, next, x + at, k, m, length, y, job->ldy, bias, at > 0);
        } else {
            float wide[4 * K_BLOCK] __attribute__((aligned(64)));
            widen(w, type, stride, next, length, wide);
            tiles(R, (const char *)wide, F32, K_BLOCK * sizeof(float), NULL, x + at, k, m, length, y, job->ldy, bias,
                  at > 0);
        }
    }
}

INLINE void linear_rows(const linear_t *job, int type, const part_t *part, long first, long last, long column,
                        long row0, long m) {
    const float *x = job->x + row0 * job->k;
    float *y = job->y + row0 * job->ldy + column;
    long n = first;
    for (; n + 4 <= last; n += 4) rows_of_y(4, job, type, part, n, x, m, y + n);
    for (; n < last; n++) rows_of_y(1, job, type, part, n, x, m, y + n);
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

void linear(const float *x, long m, long k, float *y, long ldy, int type, int parts, const part_t *part) {
    linear_t job = {.x = x, .y = y, .m = m, .k = k, .ldy = ldy, .type = type, .parts = parts};
    for (int p = 0; p < parts; p++) job.part[p] = part[p], job.n += part[p].rows;
    if (m == 0) return;
    long blocks = (m + M_BLOCK - 1) / M_BLOCK, threads = num_threads();
    long rows = job.n / (threads * 8 * (blocks > 4 ? 1 : 4 / blocks)) & ~7L;
    job.rows_per_chunk = rows < 8 ? 8 : rows > 256 ? 256 : rows;
    job.chunks_per_block = (job.n + job.rows_per_chunk - 1) / job.rows_per_chunk;
    parallel(linear_chunk, &job, blocks * job.chunks_per_block);
}
