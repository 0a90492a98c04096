#include "tensor.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "stop.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "bundles are little-endian, and nothing here swaps bytes"
#endif

static const Dtype DTYPES[] = {
    {"float32", "<f4", 2, 32}, {"float64", "<f8", 2, 64}, {"float16", "<f2", 2, 16},
    {"int8", "|i1", 0, 8},     {"uint8", "|u1", 1, 8},    {"int16", "<i2", 0, 16},
    {"int32", "<i4", 0, 32},   {"int64", "<i8", 0, 64},   {"bool", "|b1", 6, 8},
};
enum { DTYPE_COUNT = sizeof DTYPES / sizeof *DTYPES };

const Dtype *dtype_named(const char *name) {
    for (int n = 0; n < DTYPE_COUNT; ++n)
        if (strcmp(DTYPES[n].name, name) == 0)
            return &DTYPES[n];
    return NULL;
}

const Dtype *dtype_coded(uint8_t code, uint8_t bits) {
    for (int n = 0; n < DTYPE_COUNT; ++n)
        if (DTYPES[n].code == code && DTYPES[n].bits == bits)
            return &DTYPES[n];
    return NULL;
}

bool tensor_bytes(const Dtype *dtype, int rank, const int64_t *shape, size_t *bytes) {
    uint64_t product = dtype->bits / 8;
    bool empty = false;
    for (int axis = 0; axis < rank; ++axis) {
        if (shape[axis] < 0)
            return false;
        if (shape[axis] == 0)
            empty = true;
        else if (product > (uint64_t)(PTRDIFF_MAX / shape[axis]))
            return false;
        else
            product *= (uint64_t)shape[axis];
    }
    *bytes = empty ? 0 : (size_t)product;
    return true;
}

static double half(uint16_t bits) {
    int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    double value = exponent == 31  ? (mantissa ? NAN : INFINITY)
                   : exponent == 0 ? ldexp(mantissa, -24)
                                   : ldexp(mantissa + 1024, exponent - 25);
    return bits >> 15 ? -value : value;
}

#define NUMBER(type)                                                                                                   \
    do {                                                                                                               \
        type value;                                                                                                    \
        memcpy(&value, data + position * sizeof value, sizeof value);                                                  \
        return (double)value;                                                                                          \
    } while (0)

double tensor_number(const Tensor *tensor, size_t position) {
    const char *data = tensor->data;
    uint16_t bits;
    switch (tensor->dtype->code << 8 | tensor->dtype->bits) {
    case 2 << 8 | 32:
        NUMBER(float);
    case 2 << 8 | 64:
        NUMBER(double);
    case 2 << 8 | 16:
        memcpy(&bits, data + 2 * position, 2);
        return half(bits);
    case 8:
        NUMBER(int8_t);
    case 16:
        NUMBER(int16_t);
    case 32:
        NUMBER(int32_t);
    case 64:
        NUMBER(int64_t);
    default:
        NUMBER(uint8_t);
    }
}

void tensor_describe(const Dtype *dtype, int rank, const int64_t *shape, char *text, size_t size) {
    size_t used = (size_t)snprintf(text, size, "%s[", dtype->name);
    for (int axis = 0; axis < rank && used < size; ++axis)
        used += (size_t)(shape[axis] < 0
                             ? snprintf(text + used, size - used, axis ? ", N" : "N")
                             : snprintf(text + used, size - used, "%s%lld", axis ? ", " : "", (long long)shape[axis]));
    if (used < size)
        snprintf(text + used, size - used, "]");
}

/* ---- .npy (numpy/lib/format.py). Only what NumPy writes of a plain array: the dictionary's keys in order. */

static bool token(const char **at, const char *wanted) {
    while (**at == ' ')
        ++*at;
    size_t length = strlen(wanted);
    if (strncmp(*at, wanted, length) != 0)
        return false;
    *at += length;
    return true;
}

static const Dtype *npy_dtype(const char **at) {
    for (int n = 0; n < DTYPE_COUNT; ++n) {
        char quoted[8];
        snprintf(quoted, sizeof quoted, "'%s'", DTYPES[n].npy);
        if (token(at, quoted))
            return &DTYPES[n];
    }
    return NULL;
}

static bool npy_shape(const char **at, Tensor *tensor) {
    bool comma = true;
    for (tensor->rank = 0; !token(at, ")"); ++tensor->rank) {
        if (tensor->rank == MOST_AXES || !comma)
            return false;
        while (**at == ' ')
            ++*at;
        if (**at < '0' || **at > '9')
            return false;
        errno = 0;
        char *end;
        tensor->shape[tensor->rank] = strtoll(*at, &end, 10);
        if (errno)
            return false;
        *at = end;
        comma = token(at, ",");
    }
    return tensor->rank != 1 || comma; /* (3) is a number in Python, not a tuple */
}

static const char *npy_header(char *text, Tensor *tensor) {
    const char *at = text;
    if (!token(&at, "{") || !token(&at, "'descr'") || !token(&at, ":"))
        return "its header is not what NumPy writes of a plain array";
    if (!(tensor->dtype = npy_dtype(&at)))
        return "its elements are of no type that engines take";
    if (!token(&at, ",") || !token(&at, "'fortran_order'") || !token(&at, ":"))
        return "its header is not what NumPy writes of a plain array";
    if (token(&at, "True"))
        return "it is in column-major order: numpy.ascontiguousarray makes it row-major";
    if (!token(&at, "False") || !token(&at, ",") || !token(&at, "'shape'") || !token(&at, ":") || !token(&at, "(") ||
        !npy_shape(&at, tensor))
        return "its header is not what NumPy writes of a plain array";
    token(&at, ",");
    if (!token(&at, "}") || !token(&at, "\n") || *at)
        return "its header is not what NumPy writes of a plain array";
    return NULL;
}

const char *npy_parse(void *content, size_t size, Tensor *tensor) {
    unsigned char *byte = content;
    if (size < 12 || memcmp(byte, "\x93NUMPY", 6) != 0)
        return "it does not begin as a .npy file";
    if (byte[7] != 0 || (byte[6] != 1 && byte[6] != 2))
        return "it is of a .npy version other than 1.0 and 2.0";
    size_t start = byte[6] == 1 ? 10 : 12;
    size_t length = byte[8] | (size_t)byte[9] << 8;
    if (byte[6] == 2)
        length |= (size_t)byte[10] << 16 | (size_t)byte[11] << 24;
    if (length > size - start)
        return "it is cut short";
    if (length > 4096)
        return "its header is not what NumPy writes of a plain array";
    char header[4097];
    memcpy(header, byte + start, length);
    header[length] = '\0';
    const char *problem = strlen(header) == length ? npy_header(header, tensor) : "its header holds a NUL";
    if (problem)
        return problem;
    tensor->data = byte + start + length;
    if (!tensor_bytes(tensor->dtype, tensor->rank, tensor->shape, &tensor->bytes) ||
        tensor->bytes != size - start - length)
        return "its size is not what its header says";
    return NULL;
}

void npy_write(int folder, const char *name, const Tensor *tensor) {
    char header[1024], partial[300];
    int used =
        snprintf(header, sizeof header, "{'descr': '%s', 'fortran_order': False, 'shape': (", tensor->dtype->npy);
    for (int axis = 0; axis < tensor->rank; ++axis)
        used += snprintf(header + used, sizeof header - (size_t)used, axis ? " %lld," : "%lld,",
                         (long long)tensor->shape[axis]);
    used += snprintf(header + used, sizeof header - (size_t)used, "), }");
    int padding = 63 - (10 + used) % 64; /* the data begins at a multiple of 64 */
    snprintf(header + used, sizeof header - (size_t)used, "%*s\n", padding, "");
    used += padding + 1;
    unsigned char head[10] = {0x93, 'N', 'U', 'M', 'P', 'Y', 1, 0, (unsigned char)used, (unsigned char)(used >> 8)};
    snprintf(partial, sizeof partial, ".%s.%ld", name, (long)getpid());
    int number = openat(folder, partial, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0666);
    FILE *file = number < 0 ? NULL : fdopen(number, "wb");
    bool good = file && fwrite(head, sizeof head, 1, file) == 1 && fwrite(header, (size_t)used, 1, file) == 1 &&
                fwrite(tensor->data, 1, tensor->bytes, file) == tensor->bytes;
    if (file && fclose(file))
        good = false;
    if (!good || renameat(folder, partial, folder, name)) {
        int why = errno;
        unlinkat(folder, partial, 0);
        stop(MISSING, "give a folder that can be written to, on a disk with space", "%s cannot be written: %s", name,
             strerror(why));
    }
}
