#include "files.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "sha256.h"
#include "stop.h"

static const char AGAIN[] = "copy the bundle again, or build it again";

int folder_open(const char *path) {
    int folder = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (folder < 0)
        stop(REFUSED, "give a NAME.cnncc folder that `cnncc compile` made", "%s is not a bundle folder: %s", path,
             strerror(errno));
    return folder;
}

/* Open a plain file; O_NONBLOCK, so that a pipe in its place does not hang us. */
static int open_plain(int folder, const char *name, int follow, int64_t *size) {
    int flags = O_RDONLY | O_CLOEXEC | O_NONBLOCK | (follow ? 0 : O_NOFOLLOW), number = openat(folder, name, flags);
    struct stat status;
    if (number < 0 && errno != ELOOP)
        stop(REFUSED, follow ? "name a file that is there" : AGAIN, "'%s' cannot be read: %s", name, strerror(errno));
    if (number < 0 || fstat(number, &status) || !S_ISREG(status.st_mode))
        stop(REFUSED, follow ? "name a plain file" : AGAIN, "'%s' is not a plain file", name);
    *size = status.st_size;
    return number;
}

/* The same of a name with folders in it, none of which may be a link. */
static int open_inside(int folder, const char *name, int64_t *size) {
    char part[256];
    int inside = folder;
    for (const char *slash; (slash = strchr(name, '/')); name = slash + 1) {
        if ((size_t)(slash - name) >= sizeof part)
            stop(REFUSED, AGAIN, "'%s' is too long a name", name);
        memcpy(part, name, (size_t)(slash - name));
        part[slash - name] = '\0';
        int next = openat(inside, part, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
        if (next < 0)
            stop(REFUSED, AGAIN, "'%s' is not a plain folder of the bundle", part);
        if (inside != folder)
            close(inside);
        inside = next;
    }
    int number = open_plain(inside, name, 0, size);
    if (inside != folder)
        close(inside);
    return number;
}

static ssize_t read_some(int number, const char *name, void *into, size_t size) {
    ssize_t count;
    do
        count = read(number, into, size);
    while (count < 0 && errno == EINTR);
    if (count < 0)
        stop(REFUSED, AGAIN, "'%s' cannot be read: %s", name, strerror(errno));
    return count;
}

static char *read_whole(int number, const char *name, int64_t size, int64_t most) {
    if (size > most)
        stop(REFUSED, AGAIN, "'%s' has %lld bytes, more than the %lld that it may have", name, (long long)size,
             (long long)most);
    char *content = take_aligned(64, (size_t)size + 1); /* so that arrays in it may lie at multiples of 64 */
    size_t used = 0;
    while (used < (size_t)size) {
        ssize_t count = read_some(number, name, content + used, (size_t)size - used);
        if (!count)
            stop(REFUSED, AGAIN, "'%s' became shorter while it was read", name);
        used += (size_t)count;
    }
    content[size] = '\0';
    close(number);
    return content;
}

char *file_read(int folder, const char *name, int64_t most, size_t *size) {
    int64_t found;
    int number = open_plain(folder, name, 0, &found);
    *size = (size_t)found;
    return read_whole(number, name, found, most);
}

char *file_read_named(const char *path, int64_t most, size_t *size) {
    int64_t found;
    int number = open_plain(AT_FDCWD, path, 1, &found);
    *size = (size_t)found;
    return read_whole(number, path, found, most);
}

static void check_size(const FileRecord *record, int64_t size) {
    if (size != record->size)
        stop(REFUSED, AGAIN, "'%s' has %lld bytes, the manifest says %lld", record->name, (long long)size,
             (long long)record->size);
}

static void check_digest(const FileRecord *record, Sha256 *hash) {
    char found[65];
    sha256_finish(hash, found);
    if (strcmp(found, record->sha256 + strlen("sha256:")) != 0)
        stop(REFUSED, AGAIN, "'%s' was changed after it was built", record->name);
}

char *file_read_listed(int folder, const FileRecord *record, int64_t most) {
    int64_t size;
    int number = open_inside(folder, record->name, &size);
    check_size(record, size);
    char *content = read_whole(number, record->name, size, most);
    Sha256 hash;
    sha256_start(&hash);
    sha256_add(&hash, content, (size_t)size);
    check_digest(record, &hash);
    return content;
}

int file_open_listed(int folder, const FileRecord *record) {
    static char piece[1 << 16];
    int64_t size;
    int number = open_inside(folder, record->name, &size);
    check_size(record, size);
    Sha256 hash;
    sha256_start(&hash);
    for (ssize_t count; (count = read_some(number, record->name, piece, sizeof piece)) > 0;)
        sha256_add(&hash, piece, (size_t)count);
    check_digest(record, &hash);
    return number;
}

void *file_map(int number, const FileRecord *record) {
    void *start = record->size && (uint64_t)record->size <= PTRDIFF_MAX
                      ? mmap(NULL, (size_t)record->size, PROT_READ | PROT_WRITE, MAP_PRIVATE, number, 0)
                      : MAP_FAILED;
    if (start == MAP_FAILED)
        stop(REFUSED, "copy the bundle to a local disk", "'%s' cannot be mapped into memory", record->name);
    return start;
}
