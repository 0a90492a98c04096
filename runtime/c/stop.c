#include "stop.h"

#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

bool stop_as_json;

static const char *const KINDS[] = {
    [CHECK_FAILED] = "CheckFailed", [USAGE] = "UsageError",       [MISSING] = "EnvironmentMissing",
    [REFUSED] = "InputRefused",     [FAILED] = "ToolchainFailed",
};

void stop(int code, const char *hint, const char *format, ...) {
    char message[2048];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    fputs("✗ ", stderr);
    put_plain(stderr, message);
    if (*hint) {
        fputs("\n  try: ", stderr);
        put_plain(stderr, hint);
    }
    fputc('\n', stderr);
    if (stop_as_json) {
        printf("{\"error\": \"%s\", \"message\": ", KINDS[code]);
        put_json(stdout, message);
        fputs(", \"hint\": ", stdout);
        put_json(stdout, hint);
        printf(", \"exit_code\": %d}\n", code);
        fflush(stdout);
    }
    _Exit(code); /* an engine's threads may sleep; nobody needs what the libraries would tidy up */
}

int utf8_length(const char *text) {
    const unsigned char *byte = (const unsigned char *)text;
    int length = byte[0] < 0x80   ? 1
                 : byte[0] < 0xc2 ? 0
                 : byte[0] < 0xe0 ? 2
                 : byte[0] < 0xf0 ? 3
                 : byte[0] < 0xf5 ? 4
                                  : 0;
    for (int n = 1; n < length; ++n)
        if ((byte[n] & 0xc0) != 0x80)
            return 0;
    bool overlong = (byte[0] == 0xe0 && byte[1] < 0xa0) || (byte[0] == 0xf0 && byte[1] < 0x90);
    bool surrogate = byte[0] == 0xed && byte[1] > 0x9f;
    bool beyond = byte[0] == 0xf4 && byte[1] > 0x8f;
    return overlong || surrogate || beyond ? 0 : length;
}

void put_json(FILE *file, const char *text) {
    fputc('"', file);
    while (*text) {
        int length = utf8_length(text);
        if (length == 0) {
            fputs("\\ufffd", file);
            length = 1;
        } else if (*text == '"' || *text == '\\') {
            fprintf(file, "\\%c", *text);
        } else if (length == 1 && ((unsigned char)*text < 0x20 || *text == 0x7f)) {
            fprintf(file, "\\u%04x", (unsigned char)*text);
        } else {
            fwrite(text, 1, (size_t)length, file);
        }
        text += length;
    }
    fputc('"', file);
}

void put_plain(FILE *file, const char *text) {
    while (*text) {
        int length = utf8_length(text);
        const unsigned char *byte = (const unsigned char *)text;
        bool control = length == 0 || byte[0] < 0x20 || byte[0] == 0x7f || (byte[0] == 0xc2 && byte[1] < 0xa0);
        if (control)
            fputc('?', file);
        else
            fwrite(text, 1, (size_t)length, file);
        text += length ? length : 1;
    }
}

void put_document(const char *text, size_t size) {
    if (fwrite(text, 1, size, stdout) != size || fflush(stdout)) {
        stop_as_json = false;
        stop(MISSING, "is the disk full?", "the result cannot be written to the standard output");
    }
}

void *take(size_t count, size_t size) {
    void *made = calloc(count ? count : 1, size ? size : 1);
    if (!made)
        stop(MISSING, "close other programs", "no memory is left for %zu times %zu bytes", count, size);
    return made;
}

void *take_aligned(size_t alignment, size_t size) {
    void *made = NULL;
    if (posix_memalign(&made, alignment, size ? size : 1))
        stop(MISSING, "close other programs", "no memory is left for %zu bytes", size);
    return made;
}
