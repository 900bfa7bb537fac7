/* Kernels one after the other, without a return to Python in between. */
#include "kernels.h"

enum { EMBEDDING, LINEAR, ADD_RMS_NORM, SILU_MUL, ROTARY_STORE, ATTENTION };

/* One call: its arguments in their order, the only float aside. Laid out as in tape.py. */
typedef struct {
    long kernel, a[14];
    double real;
} call_t;

EXPORT void play(const call_t *call, long count) {
#define P(i) ((void *)call->a[i])
#define N(i) call->a[i]
    for (; count > 0; count--, call++) {
        switch (call->kernel) {
        case EMBEDDING: embedding(P(0), N(1), P(2), N(3), (int)N(4), N(5), call->real, P(6)); break;
        case LINEAR: linear(P(0), N(1), N(2), P(3), N(4), (int)N(5), (int)N(6), P(7)); break;
        case ADD_RMS_NORM: add_rms_norm(P(0), P(1), P(2), call->real, N(3), N(4), P(5)); break;
        case SILU_MUL: silu_mul(P(0), N(1), N(2), P(3)); break;
        case ROTARY_STORE:
            rotary_store(P(0), P(1), P(2), P(3), P(4), P(5), N(6), N(7), N(8), N(9), N(10), N(11));
            break;
        case ATTENTION:
            attention(P(0), P(1), P(2), P(3), P(4), N(5), P(6), P(7), P(8), N(9), N(10), N(11), N(12), N(13),
                      call->real);
            break;
        }
    }
}
