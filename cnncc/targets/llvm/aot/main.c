/* The executable of a network: what comes before this says what the network is.
 *
 * Arrays are files: .npy, or raw bytes. `--serve` is what cnncc's own session speaks: the raw inputs of one run after
 * the other on stdin, for each the raw outputs on stdout, until stdin ends. */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct {
    const char *name, *descr, *shape; /* the last two as a .npy file has them */
    size_t bytes, item;
} Tensor;

static const Tensor tensors[INPUTS + OUTPUTS] = {TENSORS};
static unsigned char *buffers_of[INPUTS + OUTPUTS];

enum { FAILED = 1, USAGE = 2, REFUSED = 4, BROKEN = 5 }; /* exit codes, as cnncc's own */

static int die(int code, const char *what, const char *why) {
    fprintf(stderr, "%s: %s%s%s\n", NETWORK, what, *why ? ": " : "", why);
    exit(code);
}

static int run(void) {
    void *buffers[INPUTS + OUTPUTS];
    int at;
    for (at = 0; at < INPUTS + OUTPUTS; at++) buffers[at] = buffers_of[at];
    return RUN(buffers);
}

static void must_run(void) {
    if (run()) die(BROKEN, "the network did not run", "");
}

static int ends_in_npy(const char *path) {
    size_t length = strlen(path);
    return length >= 4 && !strcmp(path + length - 4, ".npy");
}

/* Skip the header of a .npy file, having checked it: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html */
static void skip_header(FILE *file, const Tensor *tensor, const char *path) {
    unsigned char head[12];
    char text[4096], wanted[512];
    size_t length, width;
    if (fread(head, 1, 8, file) != 8 || memcmp(head, "\x93NUMPY", 6)) die(REFUSED, path, "not a .npy file");
    width = head[6] == 1 ? 2 : 4;
    if (fread(head + 8, 1, width, file) != width) die(REFUSED, path, "cut off");
    length = head[8] | (size_t)head[9] << 8;
    if (width == 4) length |= (size_t)head[10] << 16 | (size_t)head[11] << 24;
    if (length >= sizeof text || fread(text, 1, length, file) != length) die(REFUSED, path, "its header is cut off");
    text[length] = 0;
    snprintf(wanted, sizeof wanted, "'descr': '%s'", tensor->descr);
    if (!strstr(text, wanted)) die(REFUSED, path, "another type than the network takes");
    if (!strstr(text, "'fortran_order': False")) die(REFUSED, path, "not row-major");
    snprintf(wanted, sizeof wanted, "'shape': %s", tensor->shape);
    if (!strstr(text, wanted)) die(REFUSED, path, "another shape than the network takes");
}

static void read_array(const char *path, const Tensor *tensor, unsigned char *into) {
    FILE *file = fopen(path, "rb");
    if (!file) die(REFUSED, path, "cannot be read");
    if (ends_in_npy(path)) skip_header(file, tensor, path);
    if (fread(into, 1, tensor->bytes, file) != tensor->bytes) die(REFUSED, path, "fewer bytes than the network takes");
    if (fgetc(file) != EOF) die(REFUSED, path, "more bytes than the network takes");
    fclose(file);
}

static void write_array(const char *path, const Tensor *tensor, const unsigned char *from) {
    FILE *file = fopen(path, "wb");
    if (!file) die(USAGE, path, "cannot be written");
    if (ends_in_npy(path)) {
        char text[512];
        int length = snprintf(text, sizeof text, "{'descr': '%s', 'fortran_order': False, 'shape': %s, }",
                              tensor->descr, tensor->shape);
        int padded = (10 + length + 1 + 63) / 64 * 64 - 10;
        fwrite("\x93NUMPY\x01", 1, 7, file);
        fputc(0, file);
        fputc(padded & 255, file);
        fputc(padded >> 8, file);
        fprintf(file, "%s%*s\n", text, padded - length - 1, "");
    }
    if (fwrite(from, 1, tensor->bytes, file) != tensor->bytes || fclose(file)) die(USAGE, path, "cannot be written");
}

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static int ascending(const void *left, const void *right) {
    double a = *(const double *)left, b = *(const double *)right;
    return (a > b) - (a < b);
}

static void bench(long runs) {
    double *times = malloc((size_t)runs * sizeof *times);
    long at;
    if (!times) die(USAGE, "--bench", "too many runs");
    must_run();
    for (at = 0; at < runs; at++) {
        double start = seconds();
        must_run();
        times[at] = seconds() - start;
    }
    qsort(times, (size_t)runs, sizeof *times, ascending);
    printf("%ld runs: median %.4f ms, fastest %.4f ms, slowest %.4f ms\n", runs, 1e3 * times[runs / 2], 1e3 * times[0],
           1e3 * times[runs - 1]);
    free(times);
}

static double value_of(const Tensor *tensor, const unsigned char *data, size_t at) {
    char kind = tensor->descr[1];
    data += at * tensor->item;
#define AS(type) { type value; memcpy(&value, data, sizeof value); return (double)value; }
    if (kind == 'f' && tensor->item == 4) AS(float)
    if (kind == 'f' && tensor->item == 8) AS(double)
    if (kind == 'i' && tensor->item == 1) AS(int8_t)
    if (kind == 'i' && tensor->item == 2) AS(int16_t)
    if (kind == 'i' && tensor->item == 4) AS(int32_t)
    if (kind == 'i' && tensor->item == 8) AS(int64_t)
    if (tensor->item == 1) AS(uint8_t)
#undef AS
    die(USAGE, tensor->name, "--verify does not compare arrays of its type");
    return 0;
}

/* Return whether an output is what a file holds, to a relative error in the L2 norm. */
static int verify(const char *path, const Tensor *tensor, const unsigned char *got, double tolerance) {
    unsigned char *want = malloc(tensor->bytes + 1);
    double off = 0, all = 0, error;
    size_t at;
    if (!want) die(BROKEN, "no memory is left", "");
    read_array(path, tensor, want);
    for (at = 0; at < tensor->bytes / tensor->item; at++) {
        double wanted = value_of(tensor, want, at), difference = value_of(tensor, got, at) - wanted;
        off += difference * difference;
        all += wanted * wanted;
    }
    error = all > 0 ? sqrt(off / all) : sqrt(off);
    printf("%s: relative error %.2e, %s\n", tensor->name, error, error <= tolerance ? "passed" : "failed");
    free(want);
    return error <= tolerance; /* not for NaN */
}

static int serve(void) {
    int at;
    for (;;) {
        for (at = 0; at < INPUTS; at++) {
            size_t got = fread(buffers_of[at], 1, tensors[at].bytes, stdin);
            if (!at && !got && feof(stdin)) return 0;
            if (got != tensors[at].bytes) return REFUSED;
        }
        must_run();
        for (at = INPUTS; at < INPUTS + OUTPUTS; at++)
            if (fwrite(buffers_of[at], 1, tensors[at].bytes, stdout) != tensors[at].bytes) return BROKEN;
        if (fflush(stdout)) return BROKEN;
    }
}

static int usage(void) {
    int at;
    printf("usage: %s INPUT... [-o OUTPUT...]          run once; files are .npy, or raw bytes\n"
           "       %s INPUT... --verify EXPECTED...    compare the outputs with files\n"
           "       %s [INPUT...] --bench RUNS          time it, on zeros by default\n"
           "       --tolerance ERROR                   of --verify: relative, in the L2 norm  [default: 1e-4]\n\n",
           NETWORK, NETWORK, NETWORK);
    for (at = 0; at < INPUTS + OUTPUTS; at++)
        printf("%s %s: %s %s\n", at < INPUTS ? "input" : "output", tensors[at].name, tensors[at].descr,
               tensors[at].shape);
    printf("arena %ld bytes, weights %ld bytes\n", (long)ARENA, (long)WEIGHTS);
    return 0;
}

int main(int count, char **given) {
    const char **files[3];      /* inputs, -o, --verify */
    int counts[3] = {0, 0, 0}; /* how many */
    int at, into = 0, good = 1;
    long runs = 0;
    double tolerance = 1e-4;
    for (at = 0; at < INPUTS + OUTPUTS; at++) {
        /* aligned by hand: aligned_alloc is C11's */
        unsigned char *raw = calloc(1, tensors[at].bytes + 64);
        if (!raw) die(BROKEN, "no memory is left", "");
        buffers_of[at] = raw + (64 - (uintptr_t)raw % 64);
    }
    for (at = 0; at < 3; at++)
        if (!(files[at] = calloc((size_t)count + 1, sizeof *files[at]))) die(BROKEN, "no memory is left", "");
    if (count == 2 && !strcmp(given[1], "--serve")) return serve();
    if (count < 2 || !strcmp(given[1], "--help")) return usage();
    for (at = 1; at < count; at++) {
        char *end = NULL;
        if (!strcmp(given[at], "-o")) into = 1;
        else if (!strcmp(given[at], "--verify")) into = 2;
        else if (!strcmp(given[at], "--bench") || !strcmp(given[at], "--tolerance")) {
            int is_bench = given[at][2] == 'b';
            if (++at == count) die(USAGE, given[at - 1], "give it a number");
            if (is_bench) runs = strtol(given[at], &end, 10);
            else tolerance = strtod(given[at], &end);
            if (!end || *end || end == given[at] || (is_bench && runs < 1)) die(USAGE, given[at], "not such a number");
        } else if (given[at][0] == '-' && given[at][1]) die(USAGE, given[at], "unknown; --help lists what there is");
        else files[into][counts[into]++] = given[at];
    }
    if (counts[0] != INPUTS && !(runs && !counts[0])) die(USAGE, "give a file for each input", "--help lists them");
    if ((counts[1] && counts[1] != OUTPUTS) || (counts[2] && counts[2] != OUTPUTS))
        die(USAGE, "give a file for each output", "--help lists them");
    for (at = 0; at < counts[0]; at++) read_array(files[0][at], &tensors[at], buffers_of[at]);
    if (runs) bench(runs);
    else must_run();
    for (at = 0; at < counts[1]; at++) write_array(files[1][at], &tensors[INPUTS + at], buffers_of[INPUTS + at]);
    for (at = 0; at < counts[2]; at++)
        good &= verify(files[2][at], &tensors[INPUTS + at], buffers_of[INPUTS + at], tolerance);
    return good ? 0 : FAILED;
}
