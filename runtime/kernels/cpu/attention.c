/* Paged attention, causal, for a packed batch.
 *
 * A work item is one kv head of up to Q_TILE neighbouring queries of one sequence; its rows are those queries
 * times the heads that share the kv head. Softmax runs online over blocks of keys (their layout: rotary.c). */
#include "kernels.h"
#include "vectors.h"

#include <math.h>
#include <string.h>

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
