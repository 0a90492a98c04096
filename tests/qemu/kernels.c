/* Runs kernels of an engine under qemu, without TVM's libraries, which are not to be had for every machine.
 *
 *   kernels LIBRARY.so THREADS PROGRAM OUTPUT
 *
 * PROGRAM, all int64: how many tensors; of each, DLPack's type code, bits, the tensor whose memory it shares (or -1), how
 * many bytes follow, rank, sizes, and those bytes; how many calls; of each, the bytes of its name, the name, how many
 * arguments, and their tensors; how many results, and their tensors. OUTPUT gets the results' bytes, one after the
 * other. Exit code 1 and a line on stderr say what went wrong.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tvm/ffi/c_api.h>

enum { ALIGNMENT = 64, POOL_ALIGNMENT = 128, MOST_NAME = 4096 };

typedef int (*Kernel)(void *, TVMFFIAny *, int32_t, TVMFFIAny *);

static FILE *program;

static void fail(const char *what, const char *why) {
    fprintf(stderr, "%s: %s\n", what, why);
    exit(1);
}

/* ---- what TVM's code calls of TVM */

void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *message) { fail(kind, message); }

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
    for (int32_t part = 0; part < count; ++part)
        fputs(parts[part], stderr);
    fail("", kind);
}

static void *take_workspace(int device, int number, uint64_t bytes, int code, int bits) {
    void *memory;
    (void)device, (void)number, (void)code, (void)bits;
    return posix_memalign(&memory, ALIGNMENT, bytes) ? NULL : memory;
}

static int give_workspace(int device, int number, void *memory) {
    (void)device, (void)number;
    free(memory);
    return 0;
}

/* ---- the program */

static void take(void *into, size_t bytes) {
    if (fread(into, 1, bytes, program) != bytes)
        fail("PROGRAM", "is cut short");
}

static int64_t number(void) {
    int64_t value;
    take(&value, sizeof value);
    return value;
}

static void *memory(size_t bytes) {
    void *found;
    if (posix_memalign(&found, POOL_ALIGNMENT, bytes + 1))
        fail("memory", "there is none left");
    memset(found, 0xff, bytes); /* NaN, where nothing is written */
    return found;
}

static size_t bytes_of(const DLTensor *tensor) {
    size_t bytes = tensor->dtype.bits / 8;
    for (int axis = 0; axis < tensor->ndim; ++axis)
        bytes *= tensor->shape[axis];
    return bytes;
}

static DLTensor *read_tensors(void) {
    int64_t count = number();
    DLTensor *tensors = calloc(count, sizeof *tensors);
    for (DLTensor *tensor = tensors; tensor < tensors + count; ++tensor) {
        tensor->device.device_type = kDLCPU;
        tensor->dtype.code = (uint8_t)number();
        tensor->dtype.bits = (uint8_t)number();
        tensor->dtype.lanes = 1;
        int64_t shared = number(), given = number();
        tensor->ndim = (int32_t)number();
        tensor->shape = calloc(tensor->ndim + 1, sizeof *tensor->shape);
        take(tensor->shape, tensor->ndim * sizeof *tensor->shape);
        tensor->data = shared < 0 ? memory(bytes_of(tensor)) : tensors[shared].data;
        if (given && (size_t)given != bytes_of(tensor))
            fail("PROGRAM", "a tensor has other bytes than its shape");
        take(tensor->data, given);
    }
    return tensors;
}

static void call(void *library, DLTensor *tensors) {
    char name[MOST_NAME] = "";
    int64_t length = number();
    if (length >= MOST_NAME)
        fail("PROGRAM", "a name is too long");
    take(name, length);
    int64_t count = number();
    TVMFFIAny *arguments = calloc(count, sizeof *arguments), result = {0};
    for (int64_t argument = 0; argument < count; ++argument) {
        arguments[argument].type_index = kTVMFFIDLTensorPtr;
        arguments[argument].v_ptr = &tensors[number()];
    }
    Kernel kernel = (Kernel)dlsym(library, name);
    if (!kernel)
        fail(name, "no such kernel");
    if (kernel(NULL, arguments, (int32_t)count, &result))
        fail(name, "failed");
    free(arguments);
}

static void *symbol(void *library, const char *name) {
    void *found = dlsym(library, name);
    if (!found)
        fail(name, "no such symbol");
    return found;
}

static void set(void *library, const char *name, void *value) {
    void **variable = dlsym(library, name); /* absent where no kernel needs it */
    if (variable)
        *variable = value;
}

/* See cnncc_runtime/engine_threads.py. */
static void *start_threads(void *library, int threads) {
    int64_t (*size)(int32_t) = symbol(library, "cnncc_pool_bytes");
    int (*open_pool)(void *, int32_t) = symbol(library, "cnncc_pool_open");
    void (*enter)(void *) = symbol(library, "cnncc_pool_enter");
    void *pool = memory(size(threads));
    memset(pool, 0, size(threads));
    set(library, "__TVMBackendParallelLaunch", symbol(library, "cnncc_parallel_launch"));
    if (open_pool(pool, threads))
        fail("threads", "cannot be started");
    enter(pool);
    return pool;
}

int main(int count, char **names) {
    if (count != 5)
        fail("usage", "kernels LIBRARY.so THREADS PROGRAM OUTPUT");
    void *library = dlopen(names[1], RTLD_NOW);
    if (!library)
        fail(names[1], dlerror());
    set(library, "__TVMBackendAllocWorkspace", (void *)take_workspace);
    set(library, "__TVMBackendFreeWorkspace", (void *)give_workspace);
    void *pool = start_threads(library, atoi(names[2]));
    program = fopen(names[3], "rb");
    FILE *output = fopen(names[4], "wb");
    if (!program || !output)
        fail(program ? names[4] : names[3], "cannot be opened");
    DLTensor *tensors = read_tensors();
    for (int64_t calls = number(); calls > 0; --calls)
        call(library, tensors);
    for (int64_t results = number(); results > 0; --results) {
        DLTensor *tensor = &tensors[number()];
        fwrite(tensor->data, 1, bytes_of(tensor), output);
    }
    if (fclose(output))
        fail(names[4], "cannot be written");
    void (*close_pool)(void *) = (void (*)(void *))symbol(library, "cnncc_pool_close");
    close_pool(pool);
    return 0;
}
