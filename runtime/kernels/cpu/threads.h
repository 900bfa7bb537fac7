/* One pool of threads for all kernels. */
#pragma once

/* The library's entry points, which native.py calls; everything else stays inside it. */
#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define ROWS_PER_CHUNK 16 /* of jobs that touch each row but briefly */

typedef void (*chunk_fn)(const void *job, long chunk);

/* fn(job, chunk) for each chunk in [0, chunks), on all threads; returns when all are through. */
void parallel(chunk_fn fn, const void *job, long chunks);

/* How many threads work on a job, the caller's included. */
long num_threads(void);
