/* What a shared library says of itself, before it is loaded: the loader would call a wrong machine a missing file, and what
 * is cut off would end the program by a signal. */
#ifndef CNNCC_ELF_H
#define CNNCC_ELF_H

#include <stdbool.h>

/* The machine that an open file is for, or NULL where it is no shared library. */
const char *elf_machine(int file);

/* Whether an open library of this machine holds all that the loader maps of it. */
bool elf_whole(int file);

#endif
