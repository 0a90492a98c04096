/* A loaded engine: TVM's virtual machine, the engine's own threads, its weights (cnncc_runtime/tvm_session.py,
 * engine_threads.py and weights.py do the same). Each function ends the program where something fails. */
#ifndef CNNCC_ENGINE_H
#define CNNCC_ENGINE_H

#include "manifest.h"

typedef struct {
    const char *kernel;
    double seconds; /* the median of the runs */
} KernelTime;

/* Return the folder of TVM's runtime that the user named: `chosen`, else by CNNCC_TVM_RUNTIME, else NULL. */
const char *engine_runtime_named(const char *chosen);

/* Load TVM's runtime: from the folder that the user named; else the file that is open and was checked; where that is
 * -1, from beside this program. */
void engine_load_runtime(const char *named, int file);

/* Load the engine and start its threads. `file` and `weights` are open and were checked; the latter is mapped. */
void engine_open(const Manifest *manifest, int file, void *weights, int threads);

/* Say which entry runs next, on which inputs; their data lies at multiples of ALIGNMENT. */
void engine_prepare(const Entry *entry, const Tensor *inputs);

/* Run it once, and give back what it returned. */
void engine_run(void);

/* Run it once; return copies of its outputs, in the manifest's order. */
Tensor *engine_outputs(void);

/* Run it with a clock around each kernel; return the kernel calls in order of execution. */
KernelTime *engine_profile(int runs, int *count);

#endif
