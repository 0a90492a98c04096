/* Reads canonical JSON as cnncc writes it (cnncc_runtime/digests.py): keys in order, each once, no spaces, one newline
 * at the end. Whatever is spelled otherwise is refused, so that a text has one meaning. */
#ifndef CNNCC_JSON_H
#define CNNCC_JSON_H

#include <stddef.h>
#include <stdint.h>

typedef enum { JSON_NULL, JSON_BOOL, JSON_INTEGER, JSON_FRACTION, JSON_STRING, JSON_LIST, JSON_OBJECT } JsonKind;

typedef struct Json {
    JsonKind kind;
    uint32_t count;   /* members of a list or an object */
    const char *key;  /* in an object */
    const char *text; /* of a string: UTF-8 without NUL */
    int64_t integer;  /* also of a boolean */
    double fraction;  /* of every number */
    struct Json *first, *next;
} Json;

/* Parse a text of `size` bytes, after which a NUL must lie; strings are decoded in place. Return NULL where it is
 * refused; `problem` then says why. */
const Json *json_parse(char *text, size_t size, const char **problem);

/* A member of an object, or NULL. */
const Json *json_member(const Json *object, const char *key);

#endif
