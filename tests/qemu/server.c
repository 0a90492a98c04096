/* A TVM RPC server for a device without a Python: what tvm/rpc/server.py does, on libtvm_runtime alone.
 *
 *   server libtvm_ffi.so libtvm_runtime.so FOLDER
 *
 * It prints the port that it listens on, at 127.0.0.1, and serves one session after another, each in a process of its
 * own with FOLDER as its disk. Exit code 1 and a line on stderr say what went wrong.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <netinet/in.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <tvm/ffi/c_api.h>
#include <unistd.h>

enum { MAGIC = 0xFF271, LONGEST = 4096 };

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

/* ---- what sessions ask for that the runtime leaves to its server */

static const char *folder;
static int (*get_global)(const TVMFFIByteArray *, TVMFFIObjectHandle *);
static int (*set_global)(const TVMFFIByteArray *, TVMFFIObjectHandle, int);
static int (*create)(void *, TVMFFISafeCallType, void (*)(void *), TVMFFIObjectHandle *);
static int (*call_function)(TVMFFIObjectHandle, TVMFFIAny *, int32_t, TVMFFIAny *);
static int (*make_string)(const TVMFFIByteArray *, TVMFFIAny *);

static TVMFFIAny any(int32_t type, int64_t value) {
    TVMFFIAny made;
    memset(&made, 0, sizeof made);
    made.type_index = type;
    made.v_int64 = value;
    return made;
}

static TVMFFIObjectHandle global(const char *name) {
    TVMFFIByteArray bytes = {name, strlen(name)};
    TVMFFIObjectHandle found = NULL;
    if (get_global(&bytes, &found) || !found)
        fail(name, "no such function");
    return found;
}

/* Write where a session's file lies; return 0, or -1 where the argument is no text. */
static int place(const TVMFFIAny *name, char *path) {
    const char *text;
    int size;
    if (name->type_index == kTVMFFIRawStr) {
        text = name->v_c_str, size = (int)strlen(text);
    } else if (name->type_index == kTVMFFISmallStr) {
        text = name->v_bytes, size = (int)name->small_str_len;
    } else if (name->type_index == kTVMFFIStr) {
        TVMFFIByteArray *bytes = (TVMFFIByteArray *)((char *)name->v_obj + sizeof(TVMFFIObject));
        text = bytes->data, size = (int)bytes->size;
    } else {
        return -1;
    }
    snprintf(path, LONGEST, size && text[0] == '/' ? "%.0s%.*s" : "%s/%.*s", folder, size, text);
    return 0;
}

static int workpath(void *self, const TVMFFIAny *arguments, int32_t count, TVMFFIAny *result) {
    char path[LONGEST];
    (void)self;
    if (count != 1 || place(arguments, path))
        return -1;
    TVMFFIByteArray bytes = {path, strlen(path)};
    return make_string(&bytes, result);
}

static int load_module(void *self, const TVMFFIAny *arguments, int32_t count, TVMFFIAny *result) {
    char path[LONGEST];
    (void)self;
    if (count != 1 || place(arguments, path))
        return -1;
    printf("load_module %s\n", path);
    fflush(stdout);
    TVMFFIAny argument = any(kTVMFFIRawStr, (int64_t)path);
    return call_function(global("ffi.ModuleLoadFromFile"), &argument, 1, result);
}

static void offer(const char *name, TVMFFISafeCallType function) {
    TVMFFIByteArray bytes = {name, strlen(name)};
    TVMFFIObjectHandle made;
    if (create(NULL, function, NULL, &made) || set_global(&bytes, made, 1))
        fail(name, "cannot be offered");
}

/* ---- sessions */

static int receive(int connection, void *into, size_t size) {
    return recv(connection, into, size, MSG_WAITALL) == (ssize_t)size;
}

static void serve(int connection) {
    int32_t magic, size;
    char key[LONGEST];
    static const char own[] = "server:";
    int32_t answer[] = {MAGIC, sizeof own - 1};
    if (!receive(connection, &magic, sizeof magic) || magic != MAGIC || !receive(connection, &size, sizeof size) ||
        size < 0 || size > LONGEST || !receive(connection, key, size))
        return;
    send(connection, answer, sizeof answer, 0);
    send(connection, own, sizeof own - 1, 0);
    TVMFFIAny argument = any(kTVMFFIInt, connection), result = any(kTVMFFINone, 0);
    call_function(global("rpc.ServerLoop"), &argument, 1, &result);
}

int main(int count, char **names) {
    if (count != 4)
        fail("usage", "server libtvm_ffi.so libtvm_runtime.so FOLDER");
    void *ffi = library(names[1]);
    library(names[2]);
    folder = names[3];
    get_global = symbol(ffi, "TVMFFIFunctionGetGlobal");
    set_global = symbol(ffi, "TVMFFIFunctionSetGlobal");
    create = symbol(ffi, "TVMFFIFunctionCreate");
    call_function = symbol(ffi, "TVMFFIFunctionCall");
    make_string = symbol(ffi, "TVMFFIStringFromByteArray");
    offer("tvm.rpc.server.workpath", workpath);
    offer("tvm.rpc.server.load_module", load_module);

    int listener = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    if (bind(listener, (struct sockaddr *)&address, length) || listen(listener, 1) ||
        getsockname(listener, (struct sockaddr *)&address, &length))
        fail("socket", "cannot listen");
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    for (;;) {
        int connection = accept(listener, NULL, NULL);
        pid_t session = fork();
        if (!session) {
            serve(connection);
            _exit(0);
        }
        close(connection);
        waitpid(session, NULL, 0);
    }
}
