/* Golden inputs and outputs (cnncc_runtime/golden.py): a stored .npz and an index. */
#ifndef CNNCC_GOLDEN_H
#define CNNCC_GOLDEN_H

#include <stddef.h>

#include "tensor.h"

typedef struct {
    const char *name;
    Tensor tensor;
    bool limited;              /* an output of floats has bounds */
    double rel_l2, max_scaled; /* the first is negative where there is none */
} GoldenTensor;

typedef struct {
    int feed_count, output_count;
    GoldenTensor *feeds, *outputs;
} Golden;

/* Parse golden data; the program ends where it is refused. */
Golden golden_parse(char *content, size_t size);

/* Compare an output with the golden one. Write a sentence and return false where it leaves the allowed error. */
bool golden_check(const GoldenTensor *wanted, const Tensor *found, char *problem, size_t size);

#endif
