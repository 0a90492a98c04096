/* This machine's CPU, in the words of cnncc_runtime/cpu.py: what an engine may execute on it, and how many cores it may
 * use. */
#ifndef CNNCC_CPU_H
#define CNNCC_CPU_H

#include <stdbool.h>

/* As ELF files name the machine that this program was compiled for. */
const char *cpu_machine(void);

/* Whether every core has an ISA feature, by LLVM's name. */
bool cpu_has(const char *feature);

/* The features that this program looks for here, one after the other; NULL after the last. */
const char *cpu_known(int number);

/* Physical cores that this process may use: affinity, hyperthreads and cgroup quota counted. */
int cpu_cores(void);

#endif
