/* Runs one entry of an engine under qemu: what cnncc_runtime/tvm_session.py does, without a Python of the device's.
 *
 *   runner libtvm_ffi.so libtvm_runtime.so engine.so ENTRY THREADS INPUT OUTPUT
 *
 * INPUT and OUTPUT hold tensors one after the other, each as int64: DLPack's type code, bits, rank, sizes; then its
 * elements. INPUT holds the entry's inputs, then its weights. Exit code 1 and a line on stderr say what went wrong.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tvm/ffi/c_api.h>

enum { MOST_TENSORS = 1024, MOST_AXES = 32, ALIGNMENT = 64, POOL_ALIGNMENT = 128, POOLED = 2 };

static void fail(const char *what, const char *why) {
    fprintf(stderr, "%s: %s\n", what, why);
    exit(1);
}

static void *library(const char *path) {
    void *handle = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
    if (!handle)
        fail(path, dlerror());
    return handle;
}

static void *symbol(void *handle, const char *name) {
    void *found = dlsym(handle, name);
    if (!found)
        fail(name, "no such symbol");
    return found;
}

/* ---- TVM's calls */

static int (*get_global)(const TVMFFIByteArray *, TVMFFIObjectHandle *);
static int (*call_function)(TVMFFIObjectHandle, TVMFFIAny *, int32_t, TVMFFIAny *);
static void (*take_error)(TVMFFIObjectHandle *);
static int (*from_dlpack)(DLManagedTensor *, int32_t, int32_t, TVMFFIObjectHandle *);

#define CELL(type, object) ((type *)((char *)(object) + sizeof(TVMFFIObject)))

static TVMFFIAny any(int32_t type, int64_t value) {
    TVMFFIAny made;
    memset(&made, 0, sizeof made);
    made.type_index = type;
    made.v_int64 = value;
    return made;
}

static TVMFFIAny text(const char *value) { return any(kTVMFFIRawStr, (int64_t)value); }

static void check(const char *what, int code) {
    TVMFFIObjectHandle error = NULL;
    if (!code)
        return;
    take_error(&error);
    fail(what, error ? CELL(TVMFFIErrorCell, error)->message.data : "failed");
}

static TVMFFIAny call(const char *what, TVMFFIAny function, TVMFFIAny *arguments, int32_t count) {
    TVMFFIAny result = any(kTVMFFINone, 0);
    if (function.type_index != kTVMFFIFunction)
        fail(what, "no such function");
    check(what, call_function(function.v_obj, arguments, count, &result));
    return result;
}

static TVMFFIAny global(const char *name) {
    TVMFFIByteArray bytes = {name, strlen(name)};
    TVMFFIObjectHandle found = NULL;
    check(name, get_global(&bytes, &found));
    if (!found)
        fail(name, "no such function");
    return any(kTVMFFIFunction, (int64_t)found);
}

static TVMFFIAny member(TVMFFIAny module, const char *name) {
    TVMFFIAny arguments[] = {module, text(name), any(kTVMFFIBool, 1)};
    return call(name, global("ffi.ModuleGetFunction"), arguments, 3);
}

/* ---- tensors */

/* Return the file's next tensor, or none at its end. */
static TVMFFIAny read_tensor(FILE *file) {
    int64_t head[3];
    if (fread(head, sizeof *head, 3, file) != 3)
        return any(kTVMFFINone, 0);
    DLManagedTensor *made = calloc(1, sizeof *made);
    DLTensor *tensor = &made->dl_tensor;
    tensor->device.device_type = kDLCPU;
    tensor->dtype.code = (uint8_t)head[0];
    tensor->dtype.bits = (uint8_t)head[1];
    tensor->dtype.lanes = 1;
    tensor->ndim = (int32_t)head[2];
    tensor->shape = calloc(MOST_AXES, sizeof *tensor->shape);
    if (head[2] > MOST_AXES || fread(tensor->shape, sizeof *tensor->shape, head[2], file) != (size_t)head[2])
        fail("INPUT", "a tensor is cut short");
    size_t bytes = head[1] / 8;
    for (int axis = 0; axis < tensor->ndim; ++axis)
        bytes *= tensor->shape[axis];
    if (posix_memalign(&tensor->data, ALIGNMENT, bytes + 1) || fread(tensor->data, 1, bytes, file) != bytes)
        fail("INPUT", "a tensor is cut short");
    TVMFFIObjectHandle handle;
    check("INPUT", from_dlpack(made, ALIGNMENT, 1, &handle));
    return any(kTVMFFITensor, (int64_t)handle);
}

static void write_tensor(FILE *file, TVMFFIAny value) {
    if (value.type_index != kTVMFFITensor)
        fail("OUTPUT", "the entry returns something else than tensors");
    DLTensor *tensor = CELL(DLTensor, value.v_obj);
    int64_t head[] = {tensor->dtype.code, tensor->dtype.bits, tensor->ndim};
    size_t bytes = tensor->dtype.bits / 8;
    for (int axis = 0; axis < tensor->ndim; ++axis)
        bytes *= tensor->shape[axis];
    fwrite(head, sizeof *head, 3, file);
    fwrite(tensor->shape, sizeof *tensor->shape, tensor->ndim, file);
    fwrite((char *)tensor->data + tensor->byte_offset, 1, bytes, file);
}

/* ---- threads: see cnncc_runtime/engine_threads.py */

static void start_threads(void *engine, int threads) {
    int64_t (*bytes_of)(int32_t) = symbol(engine, "cnncc_pool_bytes");
    int (*open_pool)(void *, int32_t) = symbol(engine, "cnncc_pool_open");
    void (*enter)(void *) = symbol(engine, "cnncc_pool_enter");
    void **launch = dlsym(engine, "__TVMBackendParallelLaunch"); /* absent where no loop is parallel */
    void *memory;
    if (launch)
        *launch = symbol(engine, "cnncc_parallel_launch");
    if (posix_memalign(&memory, POOL_ALIGNMENT, bytes_of(threads)))
        fail("threads", "no memory");
    memset(memory, 0, bytes_of(threads));
    if (open_pool(memory, threads))
        fail("threads", "cannot be started");
    enter(memory);
}

int main(int count, char **names) {
    if (count != 8)
        fail("usage", "runner libtvm_ffi.so libtvm_runtime.so engine.so ENTRY THREADS INPUT OUTPUT");
    void *ffi = library(names[1]);
    library(names[2]);
    get_global = symbol(ffi, "TVMFFIFunctionGetGlobal");
    call_function = symbol(ffi, "TVMFFIFunctionCall");
    take_error = symbol(ffi, "TVMFFIErrorMoveFromRaised");
    from_dlpack = symbol(ffi, "TVMFFITensorFromDLPack");

    TVMFFIAny path = text(names[3]);
    TVMFFIAny module = call("load", global("ffi.ModuleLoadFromFile"), &path, 1);
    start_threads(library(names[3]), atoi(names[5]));
    TVMFFIAny machine = call("vm_load_executable", member(module, "vm_load_executable"), NULL, 0);
    TVMFFIAny device[] = {any(kTVMFFIInt, kDLCPU), any(kTVMFFIInt, 0), any(kTVMFFIInt, POOLED)};
    call("vm_initialization", member(machine, "vm_initialization"), device, 3);

    static TVMFFIAny arguments[MOST_TENSORS];
    int given = 0;
    FILE *input = fopen(names[6], "rb"), *output = fopen(names[7], "wb");
    if (!input || !output)
        fail(input ? names[7] : names[6], "cannot be opened");
    while ((arguments[given] = read_tensor(input)).type_index != kTVMFFINone)
        if (++given == MOST_TENSORS)
            fail("INPUT", "too many tensors");
    TVMFFIAny result = call(names[4], member(machine, names[4]), arguments, given);
    if (result.type_index == kTVMFFIArray) {
        TVMFFISeqCell *all = CELL(TVMFFISeqCell, result.v_obj);
        for (int64_t number = 0; number < (int64_t)all->size; ++number)
            write_tensor(output, ((TVMFFIAny *)all->data)[number]);
    } else {
        write_tensor(output, result);
    }
    if (fclose(output))
        fail(names[7], "cannot be written");
    _Exit(0); /* the engine's threads sleep, and nobody needs what the libraries would tidy up */
}
