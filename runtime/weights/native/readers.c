/* Brings runs of files to the device: several threads read into small pinned buffers and copy from there, two buffers
 * each, so that reading and copying overlap. It is C because Python's lock is taken meanwhile: by torch's import.
 * Calls of the driver are those of cuda.h, found at run time, so that building this needs no CUDA. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define BUFFERS 2 /* of each reader: one is read into while the other is copied from */
#define MAX_READERS 64
/* Of rows that are cut, parts of this size are read one by one; with smaller ones it is quicker to read whole rows. As
 * in plan.py. */
#define MIN_PART_BYTES 1024

/* Of each `pitch` bytes of the run, `width` from `skip` on go to the device, where they lie close together. */
typedef struct {
    int64_t file, start, num_bytes;
    uint64_t target;
    int64_t skip, width, pitch;
} run_t;

enum { READING, DONE, FAILED };
enum { DRIVER, READ, SHORT };

/* What went wrong first: a call of the driver and its status, a read and its errno, or a file's early end. */
typedef struct {
    int kind, code;
    const char *call;
    int64_t run;
} failure_t;

enum { HOST = 1, DEVICE = 2 }; /* CUmemorytype */

/* CUDA_MEMCPY2D */
typedef struct {
    size_t src_x, src_y;
    int src_type;
    const void *src_host;
    uint64_t src_device;
    void *src_array;
    size_t src_pitch, dst_x, dst_y;
    int dst_type;
    void *dst_host;
    uint64_t dst_device;
    void *dst_array;
    size_t dst_pitch, width, height;
} copy_2d_t;

static struct {
    int (*set_context)(void *);
    int (*allocate_pinned)(void **, size_t, unsigned);
    int (*free_pinned)(void *);
    int (*create_stream)(void **, unsigned);
    int (*destroy_stream)(void *);
    int (*create_event)(void **, unsigned);
    int (*destroy_event)(void *);
    int (*record)(void *, void *);
    int (*wait)(void *);
    int (*copy)(uint64_t, const void *, size_t, void *);
    int (*copy_2d)(const copy_2d_t *, void *);
} driver;

static const struct {
    const char *name;
    void *where;
} CALLS[] = {
    {"cuCtxSetCurrent", &driver.set_context},      {"cuMemHostAlloc", &driver.allocate_pinned},
    {"cuMemFreeHost", &driver.free_pinned},        {"cuStreamCreate", &driver.create_stream},
    {"cuStreamDestroy_v2", &driver.destroy_stream}, {"cuEventCreate", &driver.create_event},
    {"cuEventDestroy_v2", &driver.destroy_event},  {"cuEventRecord", &driver.record},
    {"cuEventSynchronize", &driver.wait},          {"cuMemcpyHtoDAsync_v2", &driver.copy},
    {"cuMemcpy2DAsync_v2", &driver.copy_2d},
};

typedef struct {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    void *context;
    int64_t buffer_bytes;
    run_t *runs; /* all that were added; the readers are at byte `at` of number `next` */
    int64_t num_runs, room, next, at;
    int closed, active, failed;
    failure_t failure;
    atomic_long done;
    int num_threads;
    pthread_t threads[MAX_READERS];
} readers_t;

typedef struct {
    char *memory[BUFFERS];
    void *copied[BUFFERS];
    void *stream;
} ring_t;

/* Find the driver's calls. Returns the name of one that is missing, or null. */
static const char *find_driver(void) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW);
    if (!library) return "libcuda.so.1";
    for (size_t i = 0; i < sizeof CALLS / sizeof *CALLS; i++) {
        void *found = dlsym(library, CALLS[i].name);
        if (!found) return CALLS[i].name;
        memcpy(CALLS[i].where, &found, sizeof found);
    }
    return NULL;
}

static void fail(readers_t *readers, int kind, int code, const char *call, int64_t run) {
    pthread_mutex_lock(&readers->lock);
    if (!readers->failed) readers->failure = (failure_t){kind, code, call, run};
    readers->failed = 1;
    pthread_cond_broadcast(&readers->changed);
    pthread_mutex_unlock(&readers->lock);
}

static int by_parts(const run_t *run) { return run->width != run->pitch && run->width >= MIN_PART_BYTES; }

/* How much of a piece is read from its file. */
static int64_t read_of(const run_t *piece) {
    return by_parts(piece) ? piece->num_bytes / piece->pitch * piece->width : piece->num_bytes;
}

/* The next piece that fits a buffer, and the run that it is of; waits for runs to be added. 0: there is no more. */
static int take(readers_t *readers, run_t *piece, int64_t *number) {
    pthread_mutex_lock(&readers->lock);
    while (readers->next == readers->num_runs && !readers->closed && !readers->failed)
        pthread_cond_wait(&readers->changed, &readers->lock);
    const int found = readers->next < readers->num_runs && !readers->failed;
    if (found) {
        const run_t *run = &readers->runs[readers->next];
        const int64_t whole = run->width == run->pitch ? 1 : run->pitch;
        const int64_t most = readers->buffer_bytes / (by_parts(run) ? run->width : whole) * whole;
        const int64_t left = run->num_bytes - readers->at;
        *piece = *run;
        *number = readers->next;
        piece->start += readers->at;
        piece->target += readers->at / run->pitch * run->width + readers->at % run->pitch;
        piece->num_bytes = left < most ? left : most;
        readers->at += piece->num_bytes;
        if (readers->at == run->num_bytes) {
            readers->next++;
            readers->at = 0;
        }
    }
    pthread_mutex_unlock(&readers->lock);
    return found;
}

#define TRY(readers, name, result, number)                   \
    do {                                                     \
        const int status_ = (result);                        \
        if (status_) {                                       \
            fail(readers, DRIVER, status_, name, number);    \
            return 0;                                        \
        }                                                    \
    } while (0)

static int make_ring(readers_t *readers, ring_t *ring) {
    TRY(readers, "cuCtxSetCurrent", driver.set_context(readers->context), -1);
    TRY(readers, "cuStreamCreate", driver.create_stream(&ring->stream, 1), -1); /* waits for no other stream */
    for (int i = 0; i < BUFFERS; i++) {
        void *memory;
        TRY(readers, "cuMemHostAlloc", driver.allocate_pinned(&memory, readers->buffer_bytes, 0), -1);
        ring->memory[i] = memory;
        TRY(readers, "cuEventCreate", driver.create_event(&ring->copied[i], 2), -1); /* without timing */
    }
    return 1;
}

/* Wait for the copies under way and give everything back. */
static void free_ring(readers_t *readers, ring_t *ring) {
    for (int i = 0; i < BUFFERS; i++) {
        if (ring->copied[i]) {
            const int status = driver.wait(ring->copied[i]);
            if (status) fail(readers, DRIVER, status, "cuEventSynchronize", -1);
            driver.destroy_event(ring->copied[i]);
        }
        if (ring->memory[i]) driver.free_pinned(ring->memory[i]);
    }
    if (ring->stream) driver.destroy_stream(ring->stream);
}

static int read_bytes(readers_t *readers, int64_t file, int64_t start, int64_t num_bytes, char *memory, int64_t number) {
    for (int64_t done = 0; done < num_bytes;) {
        const ssize_t count = pread((int)file, memory + done, num_bytes - done, start + done);
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) {
            fail(readers, count ? READ : SHORT, count ? errno : 0, "pread", number);
            return 0;
        }
        done += count;
    }
    return 1;
}

static int read_piece(readers_t *readers, const run_t *piece, int64_t number, char *memory) {
    if (!by_parts(piece)) return read_bytes(readers, piece->file, piece->start, piece->num_bytes, memory, number);
    /* Where the file is not in memory yet, it comes in one go all the same. */
    posix_fadvise((int)piece->file, piece->start, piece->num_bytes, POSIX_FADV_WILLNEED);
    for (int64_t row = 0; row < piece->num_bytes / piece->pitch; row++) {
        const int64_t start = piece->start + row * piece->pitch + piece->skip;
        if (!read_bytes(readers, piece->file, start, piece->width, memory + row * piece->width, number)) return 0;
    }
    return 1;
}

static int copy_piece(readers_t *readers, const run_t *piece, int64_t number, const char *memory, void *stream) {
    if (piece->width == piece->pitch) {
        TRY(readers, "cuMemcpyHtoDAsync", driver.copy(piece->target, memory, piece->num_bytes, stream), number);
        return 1;
    }
    if (by_parts(piece)) {
        TRY(readers, "cuMemcpyHtoDAsync", driver.copy(piece->target, memory, read_of(piece), stream), number);
        return 1;
    }
    const copy_2d_t copy = {
        .src_type = HOST, .src_host = memory + piece->skip, .src_pitch = piece->pitch,
        .dst_type = DEVICE, .dst_device = piece->target, .dst_pitch = piece->width,
        .width = piece->width, .height = piece->num_bytes / piece->pitch,
    };
    TRY(readers, "cuMemcpy2DAsync", driver.copy_2d(&copy, stream), number);
    return 1;
}

static int send_piece(readers_t *readers, const run_t *piece, int64_t number, ring_t *ring, int turn) {
    TRY(readers, "cuEventSynchronize", driver.wait(ring->copied[turn]), number);
    if (!read_piece(readers, piece, number, ring->memory[turn])) return 0;
    if (!copy_piece(readers, piece, number, ring->memory[turn], ring->stream)) return 0;
    TRY(readers, "cuEventRecord", driver.record(ring->copied[turn], ring->stream), number);
    atomic_fetch_add(&readers->done, read_of(piece));
    return 1;
}

static void *reader(void *argument) {
    readers_t *readers = argument;
    ring_t ring = {0};
    if (make_ring(readers, &ring)) {
        run_t piece;
        int64_t number;
        for (int turn = 0; take(readers, &piece, &number); turn = (turn + 1) % BUFFERS)
            if (!send_piece(readers, &piece, number, &ring, turn)) break;
    }
    free_ring(readers, &ring);
    pthread_mutex_lock(&readers->lock);
    readers->active--;
    pthread_cond_broadcast(&readers->changed);
    pthread_mutex_unlock(&readers->lock);
    return NULL;
}

/* Start `count` readers, which make their buffers and wait for runs. Null: the driver, memory or threads are
 * missing. */
EXPORT readers_t *readers_start(void *context, int count, int64_t buffer_bytes) {
    readers_t *readers = find_driver() ? NULL : calloc(1, sizeof *readers);
    if (!readers) return NULL;
    pthread_mutex_init(&readers->lock, NULL);
    pthread_condattr_t clock;
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_cond_init(&readers->changed, &clock);
    readers->context = context;
    readers->buffer_bytes = buffer_bytes;
    pthread_mutex_lock(&readers->lock);
    for (int i = 0; i < count && i < MAX_READERS; i++) {
        if (pthread_create(&readers->threads[i], NULL, reader, readers)) break;
        readers->num_threads = ++readers->active;
    }
    pthread_mutex_unlock(&readers->lock);
    if (readers->num_threads) return readers;
    free(readers);
    return NULL;
}

/* Add `count` runs, whose bytes are in their files by now. Returns 0, or 1 without memory for them. */
EXPORT int readers_add(readers_t *readers, const run_t *runs, int64_t count) {
    int status = 0;
    pthread_mutex_lock(&readers->lock);
    const int64_t needed = readers->num_runs + count;
    if (needed > readers->room) {
        const int64_t room = needed > 2 * readers->room ? needed : 2 * readers->room;
        run_t *more = realloc(readers->runs, room * sizeof *more);
        if (more) {
            readers->runs = more;
            readers->room = room;
        } else {
            status = 1;
        }
    }
    if (!status) {
        memcpy(readers->runs + readers->num_runs, runs, count * sizeof *runs);
        readers->num_runs = needed;
    }
    pthread_cond_broadcast(&readers->changed);
    pthread_mutex_unlock(&readers->lock);
    return status;
}

/* No more runs will come. */
EXPORT void readers_close(readers_t *readers) {
    pthread_mutex_lock(&readers->lock);
    readers->closed = 1;
    pthread_cond_broadcast(&readers->changed);
    pthread_mutex_unlock(&readers->lock);
}

/* Wait at most so long for every byte to be on the device. `done`: bytes that are on their way or there. */
EXPORT int readers_wait(readers_t *readers, int milliseconds, int64_t *done) {
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += milliseconds % 1000 * 1000000L;
    until.tv_sec += milliseconds / 1000 + until.tv_nsec / 1000000000L;
    until.tv_nsec %= 1000000000L;
    pthread_mutex_lock(&readers->lock);
    while (readers->active && !readers->failed)
        if (pthread_cond_timedwait(&readers->changed, &readers->lock, &until)) break;
    const int state = readers->failed ? FAILED : readers->active ? READING : DONE;
    pthread_mutex_unlock(&readers->lock);
    *done = atomic_load(&readers->done);
    return state;
}

/* End the readers, wherever they are, and free everything; what failed, if anything did, goes to `failure`. */
EXPORT void readers_end(readers_t *readers, failure_t *failure) {
    pthread_mutex_lock(&readers->lock);
    *failure = readers->failure;
    readers->failed = 1;
    pthread_cond_broadcast(&readers->changed);
    pthread_mutex_unlock(&readers->lock);
    for (int i = 0; i < readers->num_threads; i++) pthread_join(readers->threads[i], NULL);
    pthread_cond_destroy(&readers->changed);
    pthread_mutex_destroy(&readers->lock);
    free(readers->runs);
    free(readers);
}
