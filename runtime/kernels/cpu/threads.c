/* A job is a number of chunks. Each thread has a stretch of neighbouring chunks, so that it reads memory in order;
 * who is through with its own helps with the others'. The caller waits for chunks that were taken, never for a
 * thread that the machine has not scheduled yet, so a busy neighbour costs its share of the time and no more. */
#include "kernels.h"

#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MAX_THREADS 256

/* Chunks from end - left on are yet to be taken. Below zero, `left` says that somebody came too late. */
static struct {
    _Alignas(64) atomic_long left;
    long end;
} stretches[MAX_THREADS];
static _Alignas(64) atomic_long done;
static _Alignas(64) atomic_int sleepers;
static _Alignas(64) atomic_int jobs; /* begun so far: what idle threads watch, and sleep on */
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

/* Take chunks, those of thread `self` first, until all are taken. */
static void run_chunks(int self) {
    for (int i = 0; i <= num_workers; i++) {
        const int owner = (self + i) % (num_workers + 1);
        while (atomic_load_explicit(&stretches[owner].left, memory_order_relaxed) > 0) {
            const long left = atomic_fetch_sub_explicit(&stretches[owner].left, 1, memory_order_acquire);
            if (left <= 0) break;
            job_fn(job_arg, stretches[owner].end - left);
            atomic_fetch_add_explicit(&done, 1, memory_order_release);
        }
    }
}

static void *worker(void *number) {
    const int self = (int)(intptr_t)number;
    int seen = 0;
    for (;;) {
        for (int spin = 0; spin < SPINS; spin++) {
            const int now = atomic_load_explicit(&jobs, memory_order_acquire);
            if (now != seen) {
                seen = now;
                run_chunks(self);
                spin = 0;
            }
            relax();
        }
        atomic_fetch_add(&sleepers, 1);
        if (atomic_load(&jobs) == seen) syscall(SYS_futex, &jobs, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
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
    const long threads = num_threads();
    job_fn = fn;
    job_arg = job;
    atomic_store_explicit(&done, 0, memory_order_relaxed);
    for (long i = 0; i < threads; i++) {
        stretches[i].end = chunks * (i + 1) / threads;
        atomic_store_explicit(&stretches[i].left, stretches[i].end - chunks * i / threads, memory_order_release);
    }
    atomic_fetch_add(&jobs, 1);
    if (atomic_load(&sleepers)) syscall(SYS_futex, &jobs, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
    run_chunks(0);
    for (int spin = 0; atomic_load_explicit(&done, memory_order_acquire) < chunks; spin++)
        if (spin < 2000) relax();
        else sched_yield();
    atomic_flag_clear_explicit(&busy, memory_order_release);
}

long num_threads(void) { return num_workers + 1; }

void start_threads(int threads) {
    for (; num_workers < threads - 1 && num_workers < MAX_THREADS - 1; num_workers++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, worker, (void *)(intptr_t)(num_workers + 1))) break;
        pthread_detach(thread);
    }
}
