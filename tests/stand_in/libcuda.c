/* A driver without a GPU: memory of the GPU is the host's, streams are done at once, graphs hold what was enqueued.
 *
 * It stands in for libcuda.so.1, so that sessions, the bindings of the driver and all between them run where no GPU is.
 * Every call that needs a current context says so, and what is alive is counted.
 *
 * STAND_IN_GPU: "name,capability" of the one GPU, "NVIDIA L4,8.9" by default
 * STAND_IN_CUDA: version of CUDA that the driver is for, 13000 by default
 * STAND_IN_MEMORY: bytes of its memory, 1 GiB by default
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_DEVICE = 101, INVALID_CONTEXT = 201,
       NOT_FOUND = 500, CAPTURE_UNSUPPORTED = 900 };

typedef void (*host_function)(void *);
typedef struct work { struct work *next; host_function function; void *data; void *to; const void *from; size_t size; }
    work;
typedef struct { work *first, *last; } graph;
typedef struct { graph *captured; } stream;
typedef struct { struct timespec at; } event;
typedef struct allocation { struct allocation *next; uintptr_t address; size_t size; } allocation;

static int contexts, depth, alive;
static size_t used;
static allocation *allocations;

static const char *setting(const char *name, const char *otherwise) {
    const char *value = getenv(name);
    return value ? value : otherwise;
}

static size_t memory(void) { return strtoull(setting("STAND_IN_MEMORY", "1073741824"), NULL, 10); }

#define IN_CONTEXT if (!depth) return INVALID_CONTEXT

int standInAlive(void) { return alive + contexts + depth; }

int cuInit(unsigned flags) { return SUCCESS; }
int cuDriverGetVersion(int *version) { *version = atoi(setting("STAND_IN_CUDA", "13000")); return SUCCESS; }
int cuDeviceGetCount(int *count) { *count = 1; return SUCCESS; }
int cuDeviceGet(int *device, int index) { *device = 7; return index ? INVALID_DEVICE : SUCCESS; }

int cuDeviceGetName(char *name, int length, int device) {
    snprintf(name, length, "%s", setting("STAND_IN_GPU", "NVIDIA L4,8.9"));
    if (strchr(name, ',')) *strchr(name, ',') = 0;
    return SUCCESS;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    const char *capability = strchr(setting("STAND_IN_GPU", "NVIDIA L4,8.9"), ',') + 1;
    *value = atoi(attribute == 75 ? capability : strchr(capability, '.') + 1);
    return SUCCESS;
}

int cuDevicePrimaryCtxRetain(void **context, int device) { *context = &contexts; contexts++; return SUCCESS; }
int cuDevicePrimaryCtxRelease_v2(int device) { contexts--; return SUCCESS; }
int cuCtxPushCurrent_v2(void *context) { if (!contexts) return INVALID_CONTEXT; depth++; return SUCCESS; }
int cuCtxPopCurrent_v2(void **context) { IN_CONTEXT; *context = &contexts; depth--; return SUCCESS; }

int cuStreamCreate(stream **made, unsigned flags) {
    IN_CONTEXT; *made = calloc(1, sizeof **made); alive++; return SUCCESS;
}
int cuStreamDestroy_v2(stream *s) { IN_CONTEXT; free(s); alive--; return SUCCESS; }
int cuStreamSynchronize(stream *s) { IN_CONTEXT; return s->captured ? CAPTURE_UNSUPPORTED : SUCCESS; }

int cuMemAlloc_v2(uintptr_t *address, size_t size) {
    IN_CONTEXT;
    if (used + size > memory()) return OUT_OF_MEMORY;
    allocation *made = malloc(sizeof *made);
    *made = (allocation){allocations, (uintptr_t)malloc(size), size};
    allocations = made;
    *address = made->address;
    used += size;
    alive++;
    return SUCCESS;
}

int cuMemFree_v2(uintptr_t address) {
    IN_CONTEXT;
    for (allocation **at = &allocations; *at; at = &(*at)->next)
        if ((*at)->address == address) {
            allocation *gone = *at;
            *at = gone->next;
            used -= gone->size;
            free((void *)gone->address);
            free(gone);
            alive--;
            return SUCCESS;
        }
    return INVALID_VALUE;
}

int cuMemGetInfo_v2(size_t *available, size_t *total) {
    IN_CONTEXT; *total = memory(); *available = *total - used; return SUCCESS;
}
int cuMemHostAlloc(void **address, size_t size, unsigned flags) {
    IN_CONTEXT; *address = malloc(size); alive++; return SUCCESS;
}
int cuMemFreeHost(void *address) { IN_CONTEXT; free(address); alive--; return SUCCESS; }

static void perform(const work *one) {
    if (one->function) one->function(one->data);
    else memcpy(one->to, one->from, one->size);
}

static int enqueue(stream *s, work one) {
    IN_CONTEXT;
    if (!s->captured) { perform(&one); return SUCCESS; }
    work *kept = malloc(sizeof *kept);
    *kept = one;
    if (s->captured->last) s->captured->last->next = kept;
    else s->captured->first = kept;
    s->captured->last = kept;
    return SUCCESS;
}

int cuMemcpyHtoDAsync_v2(uintptr_t to, const void *from, size_t size, stream *s) {
    return enqueue(s, (work){.to = (void *)to, .from = from, .size = size});
}
int cuMemcpyDtoHAsync_v2(void *to, uintptr_t from, size_t size, stream *s) {
    return enqueue(s, (work){.to = to, .from = (void *)from, .size = size});
}
int cuLaunchHostFunc(stream *s, host_function function, void *data) {
    return enqueue(s, (work){.function = function, .data = data});
}

int cuStreamBeginCapture_v2(stream *s, int mode) {
    IN_CONTEXT; s->captured = calloc(1, sizeof(graph)); alive++; return SUCCESS;
}
int cuStreamIsCapturing(stream *s, int *status) { *status = s->captured != NULL; return SUCCESS; }
int cuStreamEndCapture(stream *s, graph **made) { IN_CONTEXT; *made = s->captured; s->captured = NULL; return SUCCESS; }
int cuGraphInstantiateWithFlags(graph **executable, graph *g, unsigned long long flags) {
    IN_CONTEXT; *executable = malloc(sizeof **executable); **executable = *g; alive++; return SUCCESS;
}
int cuGraphLaunch(graph *executable, stream *s) {
    IN_CONTEXT;
    for (work *one = executable->first; one; one = one->next) perform(one);
    return SUCCESS;
}
int cuGraphExecDestroy(graph *executable) { IN_CONTEXT; free(executable); alive--; return SUCCESS; }
int cuGraphDestroy(graph *g) { IN_CONTEXT; free(g); alive--; return SUCCESS; }

int cuEventCreate(event **made, unsigned flags) {
    IN_CONTEXT; *made = calloc(1, sizeof **made); alive++; return SUCCESS;
}
int cuEventRecord(event *e, stream *s) { IN_CONTEXT; clock_gettime(CLOCK_MONOTONIC, &e->at); return SUCCESS; }
int cuEventSynchronize(event *e) { IN_CONTEXT; return SUCCESS; }
int cuEventElapsedTime_v2(float *milliseconds, event *from, event *to) {
    IN_CONTEXT;
    *milliseconds = (to->at.tv_sec - from->at.tv_sec) * 1e3f + (to->at.tv_nsec - from->at.tv_nsec) / 1e6f;
    return SUCCESS;
}
int cuEventElapsedTime(float *milliseconds, event *from, event *to) {
    return cuEventElapsedTime_v2(milliseconds, from, to);
}
int cuEventDestroy_v2(event *e) { IN_CONTEXT; free(e); alive--; return SUCCESS; }

int cuGetErrorName(int status, const char **name) {
    *name = status == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_OF_THE_STAND_IN";
    return SUCCESS;
}
int cuGetErrorString(int status, const char **text) { *text = "the stand-in says no"; return SUCCESS; }

int cuGetProcAddress_v2(const char *symbol, void **found, int version, uint64_t flags, void *status) {
    static const char *const endings[] = {"_v2", "WithFlags", ""};
    char name[128];
    for (size_t i = 0; i < sizeof endings / sizeof *endings; i++) {
        snprintf(name, sizeof name, "%s%s", symbol, endings[i]);
        if ((*found = dlsym(RTLD_DEFAULT, name)) || (*found = dlsym(dlopen("libcuda.so.1", RTLD_NOW), name)))
            return SUCCESS;
    }
    return NOT_FOUND;
}
int cuGetProcAddress(const char *symbol, void **found, int version, uint64_t flags) {
    return cuGetProcAddress_v2(symbol, found, version, flags, NULL);
}
