/* A job is a number of chunks. Whoever takes a ticket runs that chunk; the caller waits for chunks that
 * were taken, never for a thread that the machine has not scheduled yet, so a busy neighbour costs its
 * share of the time and no more. */
#include "threads.h"

#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <unistd.h>

static _Alignas(64) atomic_long tickets;
static _Alignas(64) atomic_long done;
static _Alignas(64) atomic_int sleepers;
static atomic_int wake_word;
static chunk_fn job_fn;
static const void *job_arg;
static int num_workers;
static atomic_flag busy = ATOMIC_FLAG_INIT;
#define SPINS 20000

INLINE void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
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

void parallel(chunk_fn fn, const void *job, long chunks) {
    /* There is one job at a time: whoever comes along meanwhile, from another thread, works alone. */
    if (num_workers == 0 || chunks < 2 || atomic_flag_test_and_set_explicit(&busy, memory_order_acquire)) {
        for (long i = 0; i < chunks; i++) fn(job, i);
        return;
    }
    job_fn = fn;
    job_arg = job;
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
    atomic_flag_clear_explicit(&busy, memory_order_release);
}

long num_threads(void) { return num_workers + 1; }

/* Start threads - 1 workers; called once, before any kernel. */
EXPORT void start_threads(int threads) {
    for (; num_workers < threads - 1; num_workers++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, worker, NULL)) break;
        pthread_detach(thread);
    }
}
