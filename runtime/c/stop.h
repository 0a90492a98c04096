/* How the program ends: one sentence, what to do next, and an exit code of cnncc's (cnncc_runtime/errors.py). */
#ifndef CNNCC_STOP_H
#define CNNCC_STOP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>

enum { CHECK_FAILED = 1, USAGE = 2, MISSING = 3, REFUSED = 4, FAILED = 5 };

/* Whether a refusal is a JSON document on stdout too. */
extern bool stop_as_json;

/* End the program. The hint may be empty. */
void stop(int code, const char *hint, const char *format, ...) __attribute__((noreturn, format(printf, 3, 4)));

/* Write a text that may be hostile: as a JSON string, or for people, without what moves a terminal's cursor. */
void put_json(FILE *file, const char *text);
void put_plain(FILE *file, const char *text);

/* Write a whole document to stdout, or say that it cannot be written. */
void put_document(const char *text, size_t size);

/* Memory that is all zeros and lives until the program ends; never NULL. */
void *take(size_t count, size_t size);
/* The same at an address that is a multiple of `alignment`, not zeroed. */
void *take_aligned(size_t alignment, size_t size);

/* Bytes of the UTF-8 character that begins here; 0 where there is none. The text ends with a NUL. */
int utf8_length(const char *text);

#endif
