#include "engine.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <tvm/ffi/c_api.h>
#include <unistd.h>

#include "cpu.h"
#include "elf.h"
#include "stop.h"

enum { POOLED = 2, POOL_ALIGNMENT = 128, PIECE = 1024 };
static const char AGAIN[] = "build the bundle again";
static const char INSTALL[] =
    "copy libtvm_runtime.so of TVM 0.27, and libtvm_ffi.so if it is of TVM's wheels, beside this program, or name the "
    "folder by --runtime";

static void (*get_version)(TVMFFIVersion *);
static int (*get_global)(const TVMFFIByteArray *, TVMFFIObjectHandle *);
static int (*call_function)(TVMFFIObjectHandle, TVMFFIAny *, int32_t, TVMFFIAny *);
static int (*make_function)(void *, TVMFFISafeCallType, void (*)(void *), TVMFFIObjectHandle *);
static void (*take_error)(TVMFFIObjectHandle *);
static int (*from_dlpack)(DLManagedTensor *, int32_t, int32_t, TVMFFIObjectHandle *);
static int (*drop)(TVMFFIObjectHandle);

static struct {
    const Manifest *manifest;
    TVMFFIAny module, machine, function;
    char *mapped;
    TVMFFIAny *weights; /* as the engine sees them, once they were needed */
    TVMFFIAny *arguments;
    int argument_count;
    const Entry *entry;
} engine;

/* ---- TVM's runtime */

static const char *beside_program(void) {
    static char path[4096];
    ssize_t length = readlink("/proc/self/exe", path, sizeof path - 1);
    path[length > 0 ? length : 0] = '\0';
    char *slash = strrchr(path, '/');
    if (!slash)
        return ".";
    *slash = '\0';
    return path;
}

static void *library_of(const char *folder, const char *name) {
    char path[4352];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return NULL;
    const char *machine = elf_machine(file);
    if (!machine || strcmp(machine, cpu_machine()) != 0)
        stop(MISSING, INSTALL, "%s is no library for %s", path, cpu_machine());
    if (!elf_whole(file))
        stop(MISSING, INSTALL, "%s is cut off", path);
    close(file);
    void *handle = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
    if (!handle)
        stop(MISSING, INSTALL, "%s cannot be loaded: %s", path, dlerror());
    return handle;
}

static void *symbol(void *library, const char *name) {
    void *found = dlsym(library, name);
    if (!found)
        stop(MISSING, INSTALL, "TVM's runtime is of another release: it has no %s", name);
    return found;
}

const char *engine_runtime_named(const char *chosen) {
    const char *variable = getenv("CNNCC_TVM_RUNTIME");
    return chosen ? chosen : variable && *variable ? variable : NULL;
}

/* Return the library of TVM's that speaks C: of the wheels' two, the other one. */
static void *load_from(const char *place) {
    char folder[4096], sibling[4352];
    struct stat status;
    snprintf(folder, sizeof folder, "%s", place);
    char *slash = strrchr(folder, '/');
    if (stat(folder, &status) == 0 && S_ISREG(status.st_mode)) /* the variable may name the library itself */
        snprintf(folder, slash ? (size_t)(slash - folder) + 1 : 2, "%s", slash ? place : ".");
    snprintf(sibling, sizeof sibling, "%s/../../tvm_ffi/lib", folder); /* where pip puts it */
    void *ffi = library_of(folder, "libtvm_ffi.so");
    if (!ffi)
        ffi = library_of(sibling, "libtvm_ffi.so");
    void *runtime = library_of(folder, "libtvm_runtime.so");
    if (!runtime)
        stop(MISSING, INSTALL, "TVM's runtime (libtvm_runtime.so) is not in %s", folder);
    return ffi ? ffi : runtime;
}

static void *load_carried(int file) {
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", file);
    void *runtime = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
    if (!runtime) /* which a C library may be too old for */
        stop(MISSING, "compile for this device, or name another runtime by --runtime",
             "the bundle's libtvm_runtime.so cannot be loaded: %s", dlerror());
    return runtime;
}

void engine_load_runtime(const char *named, int file) {
    void *ffi = !named && file >= 0 ? load_carried(file) : load_from(named ? named : beside_program());
    TVMFFIVersion version = {0};
    *(void **)&get_version = symbol(ffi, "TVMFFIGetVersion");
    *(void **)&get_global = symbol(ffi, "TVMFFIFunctionGetGlobal");
    *(void **)&call_function = symbol(ffi, "TVMFFIFunctionCall");
    *(void **)&make_function = symbol(ffi, "TVMFFIFunctionCreate");
    *(void **)&take_error = symbol(ffi, "TVMFFIErrorMoveFromRaised");
    *(void **)&from_dlpack = symbol(ffi, "TVMFFITensorFromDLPack");
    *(void **)&drop = symbol(ffi, "TVMFFIObjectDecRef");
    get_version(&version);
    if (version.major != 0 || version.minor != 1)
        stop(MISSING, INSTALL, "libtvm_ffi.so is %u.%u, this program needs 0.1", version.major, version.minor);
}

/* ---- calls */

#define CELL(type, object) ((type *)((char *)(object) + sizeof(TVMFFIObject)))

static TVMFFIAny any(int32_t type, int64_t value) {
    TVMFFIAny made;
    memset(&made, 0, sizeof made);
    made.type_index = type;
    made.v_int64 = value;
    return made;
}

static TVMFFIAny pointer(int32_t type, const void *value) {
    TVMFFIAny made = any(type, 0);
    memcpy(&made.v_ptr, &value, sizeof value);
    return made;
}

/* End the program where a call failed. TVM puts traces after the first line. */
static void check(int code, int status, const char *what) {
    TVMFFIObjectHandle error = NULL;
    char line[512] = "no reason was given";
    if (!code)
        return;
    take_error(&error);
    if (error) {
        const TVMFFIByteArray *message = &CELL(TVMFFIErrorCell, error)->message;
        size_t skip = 0, length = 0;
        while (skip < message->size && strchr("\n\r ", message->data[skip]))
            ++skip;
        while (skip + length < message->size && message->data[skip + length] != '\n' && length < sizeof line - 1)
            ++length;
        if (length)
            snprintf(line, sizeof line, "%.*s", (int)length, message->data + skip);
    }
    stop(status, status == REFUSED ? AGAIN : "run `cnncc verify` on the bundle", "%s: %s", what, line);
}

static TVMFFIAny call(TVMFFIAny function, TVMFFIAny *arguments, int32_t count, int status, const char *what) {
    TVMFFIAny result = any(kTVMFFINone, 0);
    if (function.type_index != kTVMFFIFunction)
        stop(status, AGAIN, "%s: there is no such function", what);
    check(call_function(function.v_obj, arguments, count, &result), status, what);
    return result;
}

static TVMFFIAny global(const char *name) {
    TVMFFIByteArray bytes = {name, strlen(name)};
    TVMFFIObjectHandle found = NULL;
    if (get_global(&bytes, &found) || !found)
        stop(MISSING, INSTALL, "libtvm_runtime.so is not of TVM 0.27: it has no %s", name);
    return pointer(kTVMFFIFunction, found);
}

static TVMFFIAny member(TVMFFIAny module, const char *name) {
    TVMFFIAny arguments[] = {module, pointer(kTVMFFIRawStr, name), any(kTVMFFIBool, 1)};
    return call(global("ffi.ModuleGetFunction"), arguments, 3, REFUSED, "the engine cannot be started");
}

static TVMFFIAny new_machine(void) {
    TVMFFIAny device[] = {any(kTVMFFIInt, kDLCPU), any(kTVMFFIInt, 0), any(kTVMFFIInt, POOLED)};
    TVMFFIAny machine =
        call(member(engine.module, "vm_load_executable"), NULL, 0, REFUSED, "the engine cannot be started");
    call(member(machine, "vm_initialization"), device, 3, REFUSED, "the engine cannot be started");
    return machine;
}

static TVMFFIAny tensor_for_engine(const Dtype *dtype, int rank, const int64_t *shape, void *data) {
    DLManagedTensor *made = take(1, sizeof *made);
    int64_t *sizes = take((size_t)rank, sizeof *sizes);
    TVMFFIObjectHandle handle = NULL;
    memcpy(sizes, shape, (size_t)rank * sizeof *sizes);
    made->dl_tensor = (DLTensor){
        .data = data, .device = {kDLCPU, 0}, .ndim = rank, .dtype = {dtype->code, dtype->bits, 1}, .shape = sizes};
    check(from_dlpack(made, ALIGNMENT, 1, &handle), FAILED, "a tensor cannot be handed to the engine");
    return pointer(kTVMFFITensor, handle);
}

/* ---- weights */

/* Write a matrix times each part, computed in float64 and rounded once, as cnncc_runtime.weights.expand does. */
static void expand(const Weight *weight, float *into) {
    const Weight *by = &engine.manifest->weights[weight->matrix];
    const double *matrix = (const double *)(engine.mapped + by->offset);
    const float *stored = (const float *)(engine.mapped + weight->offset);
    size_t rows = (size_t)by->shape[0], columns = (size_t)by->shape[1], parts = (size_t)weight->parts;
    size_t length = weight->stored / 4 / columns / parts;
    double sums[PIECE]; /* stays in the first-level cache */
    for (size_t part = 0; part < parts; ++part, stored += columns * length, into += rows * length)
        for (size_t start = 0; start < length; start += PIECE)
            for (size_t row = 0; row < rows; ++row) {
                size_t count = length - start < PIECE ? length - start : PIECE;
                memset(sums, 0, sizeof sums);
                for (size_t column = 0; column < columns; ++column)
                    for (size_t n = 0; n < count; ++n)
                        sums[n] += matrix[row * columns + column] * (double)stored[column * length + start + n];
                for (size_t n = 0; n < count; ++n)
                    into[row * length + start + n] = (float)sums[n];
            }
}

static TVMFFIAny weight_for_engine(int64_t position) {
    TVMFFIAny *known = &engine.weights[position];
    if (known->type_index == kTVMFFINone) {
        const Weight *weight = &engine.manifest->weights[position];
        void *data = engine.mapped + weight->offset;
        if (weight->parts)
            expand(weight, data = take_aligned(ALIGNMENT, weight->bytes));
        *known = tensor_for_engine(weight->dtype, weight->rank, weight->shape, data);
    }
    return *known;
}

/* ---- threads */

static void *thread_symbol(void *library, const char *name) {
    void *found = dlsym(library, name);
    if (!found)
        stop(REFUSED, AGAIN, "the engine brings no threads: it has no %s", name);
    return found;
}

static void start_threads(void *library, int threads) {
    int64_t (*bytes_of)(int32_t);
    int (*open_pool)(void *, int32_t);
    void (*enter)(void *);
    *(void **)&bytes_of = thread_symbol(library, "cnncc_pool_bytes");
    *(void **)&open_pool = thread_symbol(library, "cnncc_pool_open");
    *(void **)&enter = thread_symbol(library, "cnncc_pool_enter");
    void **launch = dlsym(library, "__TVMBackendParallelLaunch"); /* absent where no loop is parallel */
    if (launch)
        *launch = thread_symbol(library, "cnncc_parallel_launch");
    if (threads == 1)
        return;
    size_t bytes = (size_t)bytes_of(threads);
    void *memory = memset(take_aligned(POOL_ALIGNMENT, bytes), 0, bytes);
    int code = open_pool(memory, threads);
    if (code)
        stop(FAILED, "give fewer --threads", "%d threads cannot be started: %s", threads, strerror(code));
    enter(memory);
}

/* ---- the engine */

/* An engine that crashes ends by an exit code too; only what a signal handler may do is done here. */
static void crashed(int number) {
    static const char words[] = "✗ the engine crashed\n  try: run `cnncc verify` on the bundle\n";
    ssize_t written = write(STDERR_FILENO, words, sizeof words - 1);
    (void)written;
    (void)number;
    _exit(FAILED);
}

void engine_open(const Manifest *manifest, int file, void *weights, int threads) {
    static const int deadly[] = {SIGILL, SIGSEGV, SIGBUS, SIGFPE};
    for (size_t n = 0; n < sizeof deadly / sizeof *deadly; ++n)
        signal(deadly[n], crashed);
    char path[64]; /* of the very file that was checked, whatever its name shows by now */
    snprintf(path, sizeof path, "/proc/self/fd/%d", file);
    engine.manifest = manifest;
    engine.mapped = weights;
    engine.weights = take((size_t)manifest->weight_count, sizeof *engine.weights);
    TVMFFIAny arguments[] = {pointer(kTVMFFIRawStr, path), pointer(kTVMFFIRawStr, "so")};
    engine.module = call(global("ffi.Module.load_from_file.so"), arguments, 2, REFUSED, "the engine cannot be loaded");
    void *library = dlopen(path, RTLD_NOW);
    if (!library)
        stop(REFUSED, AGAIN, "the engine cannot be loaded: %s", dlerror());
    start_threads(library, threads);
    engine.machine = new_machine();
    TVMFFIAny arity = member(engine.machine, "get_function_arity");
    for (const Entry *entry = manifest->entries; entry < manifest->entries + manifest->entry_count; ++entry) {
        TVMFFIAny name = pointer(kTVMFFIRawStr, entry->function);
        TVMFFIAny takes = call(arity, &name, 1, REFUSED, "the engine cannot be started");
        if (takes.v_int64 != manifest->input_count + entry->taken_count)
            stop(REFUSED, AGAIN, "the engine's '%s' takes %lld inputs and weights, the manifest lists %d",
                 entry->function, (long long)takes.v_int64, manifest->input_count + entry->taken_count);
    }
}

void engine_prepare(const Entry *entry, const Tensor *inputs) {
    int inputs_count = engine.manifest->input_count;
    engine.entry = entry;
    engine.function = member(engine.machine, entry->function);
    engine.argument_count = inputs_count + entry->taken_count;
    engine.arguments = take((size_t)engine.argument_count, sizeof *engine.arguments);
    for (int n = 0; n < inputs_count; ++n)
        engine.arguments[n] = tensor_for_engine(inputs[n].dtype, inputs[n].rank, inputs[n].shape, inputs[n].data);
    for (int n = 0; n < entry->taken_count; ++n)
        engine.arguments[inputs_count + n] = weight_for_engine(entry->taken[n]);
}

static TVMFFIAny run(TVMFFIAny function) {
    return call(function, engine.arguments, engine.argument_count, FAILED, "the engine failed");
}

static void drop_value(TVMFFIAny value) {
    if (value.type_index >= kTVMFFIStaticObjectBegin)
        drop(value.v_obj);
}

void engine_run(void) { drop_value(run(engine.function)); }

static Tensor copied(TVMFFIAny value) {
    if (value.type_index != kTVMFFITensor)
        stop(FAILED, AGAIN, "the engine returned something else than tensors");
    const DLTensor *from = CELL(DLTensor, value.v_obj);
    Tensor made = {.dtype = dtype_coded(from->dtype.code, from->dtype.bits), .rank = from->ndim};
    if (!made.dtype || from->dtype.lanes != 1 || from->ndim > MOST_AXES)
        stop(FAILED, AGAIN, "the engine returned a tensor of an unknown type");
    memcpy(made.shape, from->shape, (size_t)from->ndim * sizeof *made.shape);
    int64_t step = 1;
    for (int axis = from->ndim; from->strides && axis-- > 0; step *= from->shape[axis])
        if (from->shape[axis] > 1 && from->strides[axis] != step)
            stop(FAILED, AGAIN, "the engine returned a tensor that is not row-major");
    if (!tensor_bytes(made.dtype, made.rank, made.shape, &made.bytes))
        stop(FAILED, AGAIN, "the engine returned a tensor that is larger than any memory");
    made.data = take_aligned(ALIGNMENT, made.bytes);
    if (made.bytes)
        memcpy(made.data, (char *)from->data + from->byte_offset, made.bytes);
    return made;
}

Tensor *engine_outputs(void) {
    TVMFFIAny result = run(engine.function), *values = &result;
    int64_t count = 1;
    if (result.type_index == kTVMFFIArray) {
        const TVMFFISeqCell *all = CELL(TVMFFISeqCell, result.v_obj);
        values = all->data;
        count = all->size;
    }
    if (count != engine.manifest->output_count)
        stop(FAILED, AGAIN, "the engine returned %lld outputs, the manifest lists %d", (long long)count,
             engine.manifest->output_count);
    Tensor *made = take((size_t)count, sizeof *made);
    for (int64_t n = 0; n < count; ++n)
        made[n] = copied(values[n]);
    drop_value(result);
    return made;
}

/* ---- the profile */

static struct {
    double started;
    int calls, most, run, runs;
    const char **kernels;
    double *seconds; /* [call][run] */
} profile;

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

/* A kernel's name, as long as it is not the machine's own ("vm.…"). */
static const char *kernel_name(const TVMFFIAny *value, char *name, size_t size) {
    if (value->type_index == kTVMFFIRawStr)
        snprintf(name, size, "%s", value->v_c_str);
    else if (value->type_index == kTVMFFISmallStr)
        snprintf(name, size, "%.*s", (int)value->small_str_len, value->v_bytes);
    else if (value->type_index == kTVMFFIStr)
        snprintf(name, size, "%.*s", (int)CELL(TVMFFIByteArray, value->v_obj)->size,
                 CELL(TVMFFIByteArray, value->v_obj)->data);
    else
        return NULL;
    return strncmp(name, "vm.", 3) == 0 ? NULL : name;
}

static int note(void *self, const TVMFFIAny *arguments, int32_t count, TVMFFIAny *result) {
    char name[256];
    double stopped = now();
    (void)self;
    *result = any(kTVMFFIInt, 0); /* go on */
    if (count < 3 || !kernel_name(&arguments[1], name, sizeof name))
        return 0;
    if (arguments[2].v_int64) {
        profile.started = now();
        return 0;
    }
    if (profile.run == 0) { /* the first one warms up, and says which kernels there are */
        if (profile.calls == profile.most) {
            profile.most = 2 * profile.most + 64;
            profile.kernels = realloc(profile.kernels, (size_t)profile.most * sizeof *profile.kernels);
            if (!profile.kernels)
                stop(MISSING, "close other programs", "no memory is left");
        }
        profile.kernels[profile.calls] = strcpy(take(strlen(name) + 1, 1), name);
    } else if (profile.calls < profile.most) {
        profile.seconds[profile.calls * profile.runs + profile.run - 1] = stopped - profile.started;
    }
    ++profile.calls;
    return 0;
}

static int ascending(const void *left, const void *right) {
    double a = *(const double *)left, b = *(const double *)right;
    return (a > b) - (a < b);
}

KernelTime *engine_profile(int runs, int *count) {
    TVMFFIObjectHandle instrument = NULL;
    check(make_function(NULL, note, NULL, &instrument), FAILED, "the engine cannot be measured");
    TVMFFIAny machine = new_machine(), function, value = pointer(kTVMFFIFunction, instrument);
    call(member(machine, "set_instrument"), &value, 1, FAILED, "the engine cannot be measured");
    function = member(machine, engine.entry->function);
    drop_value(run(function));
    *count = profile.most = profile.calls;
    profile.runs = runs;
    profile.seconds = take((size_t)*count * (size_t)runs, sizeof *profile.seconds);
    for (profile.run = 1; profile.run <= runs; ++profile.run) {
        profile.calls = 0;
        drop_value(run(function));
    }
    KernelTime *made = take((size_t)*count, sizeof *made);
    for (int n = 0; n < *count; ++n) {
        double *times = profile.seconds + (size_t)n * (size_t)runs;
        qsort(times, (size_t)runs, sizeof *times, ascending);
        made[n] = (KernelTime){profile.kernels[n], times[runs / 2]};
    }
    return made;
}
