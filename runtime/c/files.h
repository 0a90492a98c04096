/* Opens and reads files of a bundle, which may be hostile: plain files only, no links, of the size and digest that the
 * manifest states. Each function ends the program where that is not so. */
#ifndef CNNCC_FILES_H
#define CNNCC_FILES_H

#include <stddef.h>
#include <stdint.h>

typedef struct {
    const char *name; /* in the bundle */
    const char *role;
    const char *sha256;
    int64_t size;
} FileRecord;

/* Open a bundle's folder. */
int folder_open(const char *path);

/* Read a whole file, which a NUL is put after. Links are refused where it is a bundle's. */
char *file_read(int folder, const char *name, int64_t most, size_t *size);

/* Read a file that the user named: it may be a link. */
char *file_read_named(const char *path, int64_t most, size_t *size);

/* Read a file of the bundle whose size and digest match. */
char *file_read_listed(int folder, const FileRecord *record, int64_t most);

/* Open a file of the bundle whose size and digest match; what the number shows was checked. */
int file_open_listed(int folder, const FileRecord *record);

/* Map such a file: writable, but what is written is this process's own. */
void *file_map(int number, const FileRecord *record);

#endif
