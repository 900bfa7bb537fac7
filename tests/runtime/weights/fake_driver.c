/* A CUDA driver whose device is the host's memory. Copies run as late as they may: when an event after them is waited
 * for. So a buffer that is used again too early shows in what arrives. FAKE_DRIVER_FAILS names a call that fails. */
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define MOST_COPIES 1024 /* that may be under way on a stream */

typedef struct {
    char *target;
    const char *source;
    size_t width, height, source_pitch;
} copy_t;
typedef struct {
    copy_t copies[MOST_COPIES];
    int begun, done;
} stream_t;
typedef struct {
    stream_t *stream;
    int after;
} event_t;
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

static atomic_int left_pinned;
static size_t downloaded;

static int status(const char *call) {
    const char *fails = getenv("FAKE_DRIVER_FAILS");
    return fails && !strcmp(fails, call) ? 700 : 0;
}

static void begin(stream_t *stream, copy_t copy) { stream->copies[stream->begun++ % MOST_COPIES] = copy; }

static void finish(stream_t *stream, int until) {
    for (; stream->done < until; stream->done++) {
        const copy_t *copy = &stream->copies[stream->done % MOST_COPIES];
        for (size_t row = 0; row < copy->height; row++)
            memcpy(copy->target + row * copy->width, copy->source + row * copy->source_pitch, copy->width);
    }
}

int cuInit(unsigned flags) { return (void)flags, status("cuInit"); }
int cuDeviceGet(int *device, int index) { return *device = index, 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return (void)device, *context = context, 0; }
int cuCtxSetCurrent(void *context) { return (void)context, 0; }
int cuGetErrorString(int code, const char **text) { return (void)code, *text = "an illegal address", 0; }
int cuMemAlloc_v2(uint64_t *address, size_t size) { return *address = (uintptr_t)malloc(size), 0; }
int cuMemFree_v2(uint64_t address) { return free((void *)(uintptr_t)address), 0; }
int cuCtxGetDevice(int *device) { return *device = 0, 0; }
int cuMemGetAllocationGranularity(size_t *size, const void *properties, int option) {
    return (void)properties, (void)option, *size = 1, 0;
}
int cuMemAddressReserve(uint64_t *address, size_t size, size_t alignment, uint64_t near, uint64_t flags) {
    return (void)alignment, (void)near, (void)flags, *address = (uintptr_t)malloc(size), 0;
}
int cuMemAddressFree(uint64_t address, size_t size) { return (void)size, free((void *)(uintptr_t)address), 0; }
int cuMemCreate(uint64_t *handle, size_t size, const void *properties, uint64_t flags) {
    return (void)size, (void)properties, (void)flags, *handle = 1, 0;
}
int cuMemRelease(uint64_t handle) { return (void)handle, 0; }
int cuMemMap(uint64_t address, size_t size, size_t offset, uint64_t handle, uint64_t flags) {
    return (void)address, (void)size, (void)offset, (void)handle, (void)flags, 0;
}
int cuMemUnmap(uint64_t address, size_t size) { return (void)address, (void)size, 0; }
int cuMemSetAccess(uint64_t address, size_t size, const void *access, size_t count) {
    return (void)address, (void)size, (void)access, (void)count, 0;
}
int cuMemHostAlloc(void **memory, size_t size, unsigned flags) {
    return (void)flags, *memory = malloc(size), status("cuMemHostAlloc");
}
int cuMemFreeHost(void *memory) { return free(memory), 0; }
int cuStreamCreate(void **stream, unsigned flags) { return (void)flags, *stream = calloc(1, sizeof(stream_t)), 0; }
int cuStreamDestroy_v2(void *stream) { return free(stream), 0; }
int cuEventCreate(void **event, unsigned flags) { return (void)flags, *event = calloc(1, sizeof(event_t)), 0; }
int cuEventDestroy_v2(void *event) { return free(event), 0; }
int cuEventRecord(event_t *event, stream_t *stream) {
    event->stream = stream;
    event->after = stream->begun;
    return 0;
}
int cuEventSynchronize(event_t *event) {
    if (event->stream) finish(event->stream, event->after);
    return 0;
}
int cuMemcpyHtoDAsync_v2(uint64_t target, const void *source, size_t size, void *stream) {
    begin(stream, (copy_t){(char *)(uintptr_t)target, source, size, 1, size});
    return status("cuMemcpyHtoDAsync_v2");
}
int cuMemcpy2DAsync_v2(const copy_2d_t *copy, void *stream) {
    begin(stream, (copy_t){(char *)(uintptr_t)copy->dst_device, copy->src_host, copy->width, copy->height,
                           copy->src_pitch});
    return status("cuMemcpy2DAsync_v2");
}
int cuMemcpyDtoHAsync_v2(void *target, uint64_t source, size_t size, void *stream) {
    begin(stream, (copy_t){target, (const char *)(uintptr_t)source, size, 1, size});
    downloaded += size;
    return 0;
}
int cuStreamSynchronize(stream_t *stream) { return finish(stream, stream->begun), 0; }
int cuMemHostRegister_v2(void *memory, size_t size, unsigned flags) {
    const int failed = status("cuMemHostRegister_v2");
    if (!failed) left_pinned++;
    return (void)memory, (void)size, (void)flags, failed;
}
int cuMemHostUnregister(void *memory) { return (void)memory, left_pinned--, 0; }
int fake_left_pinned(void) { return left_pinned; }
size_t fake_downloaded(void) { return downloaded; }
