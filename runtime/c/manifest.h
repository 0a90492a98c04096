/* What a bundle says of itself (cnncc_runtime/bundle.py and weights.py, whose rules these are). */
#ifndef CNNCC_MANIFEST_H
#define CNNCC_MANIFEST_H

#include "files.h"
#include "tensor.h"

#define SCHEMA "cnncc.bundle/5"
#define ABI "tvm-ffi 0.1, tvm 0.27, threads 1"
#define FORMAT "tvm-vm"

enum { BATCH = -1 }; /* a size that is the batch's */

typedef struct {
    const char *name;
    const Dtype *dtype;
    int rank;
    int64_t shape[MOST_AXES];
} Spec;

typedef struct {
    int64_t offset;
    const Dtype *dtype;
    int rank;
    int64_t shape[MOST_AXES];
    size_t bytes;          /* in memory */
    size_t stored;         /* in the file */
    int64_t matrix, parts; /* the expansion, if `parts` is not 0 */
} Weight;

typedef struct {
    int64_t batch; /* 0: the model has none */
    const char *function;
    int taken_count;
    const int64_t *taken; /* positions of weights */
} Entry;

typedef struct {
    const char *name, *parity, *device, *cpu, *machine, *gpu, *format, *abi;
    int feature_count, input_count, output_count, weight_count, entry_count;
    const char **features;
    Spec *inputs, *outputs;
    Weight *weights;
    Entry *entries;
    const FileRecord *engine, *weights_file, *golden, *runtime; /* all but the first may be NULL */
} Manifest;

/* Read and check the manifest of a bundle's folder; the program ends where it is refused. */
Manifest manifest_read(int folder);

#endif
