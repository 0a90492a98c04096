/* Arrays, and .npy files of them. */
#ifndef CNNCC_TENSOR_H
#define CNNCC_TENSOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { MOST_AXES = 32, ALIGNMENT = 64 }; /* TVM's kernels assume it of every buffer */

typedef struct {
    const char *name; /* NumPy's */
    const char *npy;
    uint8_t code, bits; /* DLPack's */
} Dtype;

typedef struct {
    const Dtype *dtype;
    int rank;
    int64_t shape[MOST_AXES];
    void *data; /* row-major */
    size_t bytes;
} Tensor;

/* The element types that cross an engine's boundary (cnncc_runtime/specs.py); NULL for others. */
const Dtype *dtype_named(const char *name);
const Dtype *dtype_coded(uint8_t code, uint8_t bits);

/* Bytes of a tensor, or false where memory cannot hold so many. */
bool tensor_bytes(const Dtype *dtype, int rank, const int64_t *shape, size_t *bytes);

/* An element as a number; exact but for int64. */
double tensor_number(const Tensor *tensor, size_t position);

/* Write `float32[1, 3, 28, 28]`; N for a size that is negative. */
void tensor_describe(const Dtype *dtype, int rank, const int64_t *shape, char *text, size_t size);

/* Parse a .npy file, whose data is not copied. Return what is wrong with it, or NULL. */
const char *npy_parse(void *content, size_t size, Tensor *tensor);

/* Write a .npy file into a folder, whole or not at all; the program ends where that cannot be. */
void npy_write(int folder, const char *name, const Tensor *tensor);

#endif
