/* Kernels for CPUs, called through ctypes with plain pointers: see native.py for how this is built.
 *
 * Activations are float32. Weights stay in the checkpoint's own format (float32, float16 or bfloat16)
 * and in the mapped file: every linear layer reads them row by row, so nothing is packed at start.
 * Matrices are row-major; sizes are in elements. Compiled for the machine at hand, so the vector
 * width below is the widest that the compiler was told of.
 */
#include <limits.h>
#include <linux/futex.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
typedef float vf __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
#define INLINE static inline __attribute__((always_inline))

INLINE vf load(const float *p) { return *(const vf *)p; }
INLINE void store(float *p, vf v) { *(vf *)p = v; }
INLINE vf splat(float x) { return x - (vf){0}; }

typedef float v4 __attribute__((vector_size(16), aligned(4), may_alias));

INLINE v4 fold(vf v) {
#if LANES == 16
    typedef float v8 __attribute__((vector_size(32)));
    v8 h = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
           __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    return __builtin_shufflevector(h, h, 0, 1, 2, 3) + __builtin_shufflevector(h, h, 4, 5, 6, 7);
#elif LANES == 8
    return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
#else
    return v;
#endif
}

INLINE vf pick(vi mask, vf yes, vf no) { return (vf)(((vi)yes & mask) | ((vi)no & ~mask)); }

/* The sum of each of four vectors. */
INLINE v4 sum4(vf a, vf b, vf c, vf d) {
    v4 p = fold(a), q = fold(b), r = fold(c), s = fold(d);
    v4 pq = __builtin_shufflevector(p, q, 0, 4, 1, 5) + __builtin_shufflevector(p, q, 2, 6, 3, 7);
    v4 rs = __builtin_shufflevector(r, s, 0, 4, 1, 5) + __builtin_shufflevector(r, s, 2, 6, 3, 7);
    return __builtin_shufflevector(pq, rs, 0, 1, 4, 5) + __builtin_shufflevector(pq, rs, 2, 3, 6, 7);
}

INLINE float sum(vf v) {
    v4 f = fold(v);
    return (f[0] + f[2]) + (f[1] + f[3]); /* in the order of sum4 */
}

/* ---- threads ------------------------------------------------------------------------------------
 * A job is a number of chunks. Whoever takes a ticket runs that chunk; the caller waits for chunks
 * that were taken, never for a thread that the machine has not scheduled yet, so a busy neighbour
 * costs its share of the time and no more. */
typedef void (*chunk_fn)(const void *job, long chunk);
static _Alignas(64) atomic_long tickets;
static _Alignas(64) atomic_long done;
static _Alignas(64) atomic_int sleepers;
static atomic_int wake_word;
static chunk_fn job_fn;
static const void *job_arg;
static int num_workers;
#define SPINS 20000

INLINE void relax(void) {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int run_chunk(void) {
    if (atomic_load_explicit(&tickets, memory_order_relaxed) <= 0) return 0;
    long ticket = atomic_fetch_sub_explicit(&tickets, 1, memory_order_acquire);
    if (ticket <= 0) return 0;
    job_fn(job_arg, ticket - 1);
    atomic_fetch_add_explicit(&done, 1, memory_order_release);
    return 1;
}

static void *worker(void *unused) {
    (void)unused;
    for (;;) {
        for (int spin = 0; spin < SPINS; spin++) {
            if (run_chunk()) spin = 0;
            relax();
        }
        int seen = atomic_load(&wake_word);
        atomic_fetch_add(&sleepers, 1);
        if (atomic_load(&tickets) <= 0) syscall(SYS_futex, &wake_word, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
        atomic_fetch_sub(&sleepers, 1);
    }
    return NULL;
}

static void parallel(chunk_fn fn, const void *arg, long chunks) {
    if (num_workers == 0 || chunks < 2) {
        for (long i = 0; i < chunks; i++) fn(arg, i);
        return;
    }
    job_fn = fn;
    job_arg = arg;
    atomic_store_explicit(&done, 0, memory_order_relaxed);
    atomic_store(&tickets, chunks);
    if (atomic_load(&sleepers)) {
        atomic_fetch_add(&wake_word, 1);
        syscall(SYS_futex, &wake_word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
    }
    while (run_chunk()) {}
    for (int spin = 0; atomic_load_explicit(&done, memory_order_acquire) < chunks; spin++)
        if (spin < 2000) relax();
        else sched_yield();
}

/* Start threads - 1 workers; called once, before any kernel. */
void start_threads(int threads) {
    for (; num_workers < threads - 1; num_workers++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, worker, NULL)) break;
        pthread_detach(thread);
    }
}

/* ---- linear: y[m, n] = x[m, k] . w[n, k]^T (+ bias), w in up to three parts stacked along n --------
 * Every path below adds up a row in the same order (lane by lane over K_BLOCK elements, the lanes, the tail,
 * then the blocks), so a row of y has the same bits whatever else is in the batch. That order allows one
 * accumulator a row, which costs a single stream about a sixth of its speed and buys reproducible answers. */
enum { F32 = 0, F16 = 1, BF16 = 2 };
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

INLINE float half_bits(uint16_t h) {
#if defined(__F16C__)
    return _cvtsh_ss(h);
#else
    _Float16 f;
    memcpy(&f, &h, 2);
    return (float)f;
#endif
}

INLINE float weight_at(const void *w, int type, long i) {
    if (type == F32) return ((const float *)w)[i];
    uint16_t h = ((const uint16_t *)w)[i];
    if (type == F16) return half_bits(h);
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

INLINE vf weights_at(const void *w, int type, long i) {
    if (type == F32) return load((const float *)w + i);
    const uint16_t *h = (const uint16_t *)w + i;
    if (type == BF16) return (vf)(__builtin_convertvector(*(const vh *)h, vu) << 16);
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)h));
#elif defined(__AVX2__) && defined(__F16C__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)h));
#else
    vf v;
    for (int lane = 0; lane < LANES; lane++) v[lane] = half_bits(h[lane]);
    return v;
#endif
}

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

void linear(const float *x, long m, long k, float *y, long ldy, int type, int parts, const part_t *part) {
    linear_t job = {.x = x, .y = y, .m = m, .k = k, .ldy = ldy, .type = type, .parts = parts};
    for (int p = 0; p < parts; p++) job.part[p] = part[p], job.n += part[p].rows;
    long blocks = (m + M_BLOCK - 1) / M_BLOCK, threads = num_workers + 1;
    long rows = job.n / (threads * 8 * (blocks > 4 ? 1 : 4 / blocks)) & ~7L;
    job.rows_per_chunk = rows < 8 ? 8 : rows > 256 ? 256 : rows;
    job.chunks_per_block = (job.n + job.rows_per_chunk - 1) / job.rows_per_chunk;
    parallel(linear_chunk, &job, blocks * job.chunks_per_block);
}

/* ---- norm and activation ---------------------------------------------------------------------------- */
#define ROWS_PER_CHUNK 16

INLINE vf exp_lanes(vf x) {
    /* exp(x) = 2^n * exp(r), |r| <= ln(2)/2; exp(r) by its Taylor series to the sixth power: error < 2 ulp. */
    const vf low = splat(-87.0f), high = splat(88.0f);
    x = pick(x < low, low, x);
    x = pick(x > high, high, x);
    vf t = x * 1.44269504f + 12582912.0f; /* adding 1.5 * 2^23 rounds to an integer in the low bits */
    vf n = t - 12582912.0f;
    vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vf p = splat(1.0f / 720);
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    vi exponent = ((vi)t - 0x4B400000 + 127) << 23;
    return p * (vf)exponent;
}

typedef struct {
    const float *x, *weight;
    float *residual, *out;
    long m, n;
    float eps;
} rows_t;

static void add_rms_norm_chunk(const void *arg, long chunk) {
    const rows_t *job = arg;
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

/* residual[m, n] += x (unless x is null); out = residual / rms(residual) * weight */
void add_rms_norm(const float *x, float *residual, const float *weight, float eps, long m, long n, float *out) {
    rows_t job = {.x = x, .residual = residual, .weight = weight, .eps = eps, .m = m, .n = n, .out = out};
    parallel(add_rms_norm_chunk, &job, (m + ROWS_PER_CHUNK - 1) / ROWS_PER_CHUNK);
}

static void silu_mul_chunk(const void *arg, long chunk) {
    const rows_t *job = arg;
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

/* out[m, n] = silu(x[:, :n]) * x[:, n:] */
void silu_mul(const float *x, long m, long n, float *out) {
    rows_t job = {.x = x, .m = m, .n = n, .out = out};
    parallel(silu_mul_chunk, &job, (m + ROWS_PER_CHUNK - 1) / ROWS_PER_CHUNK);
}

/* ---- rotary embedding and the write into the paged cache ------------------------------------------------
 * Keys are kept transposed within a block, [block, kv_head, head_dim, block_size], so that a query meets
 * neighbouring tokens in neighbouring lanes; values are [block, kv_head, block_size, head_dim]. */
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
    rotary_t job = {qkv, keys, values, cos_sin, positions, slots, m, heads, kv_heads, head_dim, rotary_dim, block_size};
    parallel(rotary_chunk, &job, (m + ROWS_PER_CHUNK - 1) / ROWS_PER_CHUNK);
}

/* ---- paged attention, causal, for a packed batch ---------------------------------------------------------
 * A work item is one kv head of up to Q_TILE neighbouring queries of one sequence; its rows are those queries
 * times the heads that share the kv head. Softmax runs online over blocks of keys. */
#define Q_TILE 8
#define MAX_ROWS 128
#define MAX_DIM 256
#define MAX_BLOCK 128

typedef struct {
    const float *qkv, *keys, *values;
    float *out;
    const int32_t *tables, *query_start, *seq_lens;
    const int32_t *items; /* [num_items, 2]: sequence, first query in it */
    long table_stride, heads, kv_heads, head_dim, block_size, num_items, q_tile;
    float scale;
} attention_t;

/* scores[r, 0:size] = q[r] . keys for R rows; size is a multiple of the lane count */
#define SCORES(R)                                                                                              \
    INLINE void scores_##R(const float *const *q, const float *keys, long d, long size, float *out) {          \
        for (long at = 0; at < size; at += LANES) {                                                            \
            vf acc[R] = {{0}};                                                                                 \
            for (long i = 0; i < d; i++) {                                                                     \
                vf key = load(keys + i * size + at);                                                           \
                for (int r = 0; r < R; r++) acc[r] += key * q[r][i];                                           \
            }                                                                                                  \
            for (int r = 0; r < R; r++) store(out + r * MAX_BLOCK + at, acc[r]);                               \
        }                                                                                                      \
    }
/* acc[r, 0:d] = acc[r] * fade[r] + weights[r, 0:count] . values */
#define MIX(R)                                                                                                 \
    INLINE void mix_##R(const float *weights, const float *values, long d, long count, const float *fade,      \
                        float *acc) {                                                                          \
        for (long at = 0; at < d; at += LANES) {                                                               \
            vf sums[R];                                                                                        \
            for (int r = 0; r < R; r++) sums[r] = load(acc + r * MAX_DIM + at) * fade[r];                      \
            for (long t = 0; t < count; t++) {                                                                 \
                vf value = load(values + t * d + at);                                                          \
                for (int r = 0; r < R; r++) sums[r] += value * weights[r * MAX_BLOCK + t];                     \
            }                                                                                                  \
            for (int r = 0; r < R; r++) store(acc + r * MAX_DIM + at, sums[r]);                                \
        }                                                                                                      \
    }
SCORES(1)
SCORES(3)
SCORES(6)
MIX(1)
MIX(3)
MIX(6)

static void attention_chunk(const void *arg, long chunk) {
    const attention_t *job = arg;
    const long item = chunk / job->kv_heads, head = chunk % job->kv_heads;
    const long sequence = job->items[2 * item], first = job->items[2 * item + 1];
    const long group = job->heads / job->kv_heads, d = job->head_dim, size = job->block_size;
    const long query0 = job->query_start[sequence], queries = job->query_start[sequence + 1] - query0;
    const long count = queries - first < job->q_tile ? queries - first : job->q_tile, rows = count * group;
    const long position0 = job->seq_lens[sequence] - queries + first;
    const long row_stride = (job->heads + 2 * job->kv_heads) * d;
    const int32_t *table = job->tables + sequence * job->table_stride;
    float acc[MAX_ROWS * MAX_DIM] __attribute__((aligned(64)));
    float scores[6 * MAX_BLOCK] __attribute__((aligned(64)));
    float top[MAX_ROWS], total[MAX_ROWS];
    const float *q[MAX_ROWS];
    for (long r = 0; r < rows; r++) {
        q[r] = job->qkv + (query0 + first + r / group) * row_stride + (head * group + r % group) * d;
        top[r] = -INFINITY, total[r] = 0;
        memset(acc + r * MAX_DIM, 0, d * sizeof(float));
    }
    for (long key0 = 0; key0 < position0 + count; key0 += size) {
        const long block = table[key0 / size];
        const float *keys = job->keys + (block * job->kv_heads + head) * d * size;
        const float *values = job->values + (block * job->kv_heads + head) * d * size;
        for (long r = 0; r < rows;) {
            const long step = rows - r >= 6 ? 6 : rows - r >= 3 ? 3 : 1;
            if (step == 6) scores_6(q + r, keys, d, size, scores);
            else if (step == 3) scores_3(q + r, keys, d, size, scores);
            else scores_1(q + r, keys, d, size, scores);
            float fade[6];
            long longest = 0;
            for (long s = 0; s < step; s++) {
                float *row = scores + s * MAX_BLOCK;
                long visible = position0 + (r + s) / group - key0 + 1;
                visible = visible > size ? size : visible < 0 ? 0 : visible;
                if (visible > longest) longest = visible;
                float best = top[r + s];
                for (long t = 0; t < visible; t++) best = row[t] * job->scale > best ? row[t] * job->scale : best;
                fade[s] = visible ? expf(top[r + s] - best) : 1.0f;
                for (long t = visible; t < size; t++) row[t] = -INFINITY;
                vf sums = {0};
                for (long t = 0; t < size && visible; t += LANES) {
                    vf p = exp_lanes(load(row + t) * job->scale - best);
                    store(row + t, p);
                }
                for (long t = visible; t < size; t++) row[t] = 0;
                for (long t = 0; t < size; t += LANES) sums += load(row + t);
                total[r + s] = total[r + s] * fade[s] + sum(sums);
                top[r + s] = best;
            }
            if (step == 6) mix_6(scores, values, d, longest, fade, acc + r * MAX_DIM);
            else if (step == 3) mix_3(scores, values, d, longest, fade, acc + r * MAX_DIM);
            else mix_1(scores, values, d, longest, fade, acc + r * MAX_DIM);
            r += step;
        }
    }
    for (long r = 0; r < rows; r++) {
        float *out = job->out + ((query0 + first + r / group) * job->heads + head * group + r % group) * d;
        for (long i = 0; i < d; i++) out[i] = acc[r * MAX_DIM + i] / total[r];
    }
}

/* How many neighbouring queries one work item may hold for this many heads a kv head; 0: not supported. */
int attention_tile(long group, long head_dim, long block_size) {
    if (head_dim > MAX_DIM || head_dim % LANES || block_size > MAX_BLOCK || block_size % LANES || group > MAX_ROWS)
        return 0;
    return group * Q_TILE <= MAX_ROWS ? Q_TILE : (int)(MAX_ROWS / group);
}

void attention(const float *qkv, const float *keys, const float *values, float *out, const int32_t *tables,
               long table_stride, const int32_t *query_start, const int32_t *seq_lens, const int32_t *items,
               long num_items, long heads, long kv_heads, long head_dim, long block_size, float scale) {
    attention_t job = {.qkv = qkv, .keys = keys, .values = values, .out = out, .tables = tables,
                       .query_start = query_start, .seq_lens = seq_lens, .items = items,
                       .table_stride = table_stride, .heads = heads, .kv_heads = kv_heads, .head_dim = head_dim,
                       .block_size = block_size, .num_items = num_items, .scale = scale,
                       .q_tile = attention_tile(heads / kv_heads, head_dim, block_size)};
    parallel(attention_chunk, &job, num_items * kv_heads);
}
