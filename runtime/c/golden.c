#include "golden.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "json.h"
#include "stop.h"

#define GOLDEN_SCHEMA "cnncc.golden/1"

enum { FLOAT = 2 }; /* DLPack's type code */

static void refuse(const char *why) __attribute__((noreturn));

static void refuse(const char *why) {
    stop(REFUSED, "build the bundle again", "the golden data cannot be read: %s", why);
}

/* ---- a zip of stored members (PKWARE's APPNOTE, 4.3) */

typedef struct {
    unsigned char *content;
    size_t size, members, directory;
} Zip;

static uint32_t number(const unsigned char *at, int bytes) {
    uint32_t value = 0;
    while (bytes--)
        value = value << 8 | at[bytes];
    return value;
}

static Zip zip_open(char *content, size_t size) {
    enum { END = 22 };
    Zip zip = {(unsigned char *)content, size, 0, 0};
    if (size < END || number(zip.content + size - END, 4) != 0x06054b50)
        refuse("it is no .npz, or cut short");
    zip.members = number(zip.content + size - END + 10, 2);
    zip.directory = number(zip.content + size - END + 16, 4);
    if (zip.directory > size - END)
        refuse("its directory lies outside");
    return zip;
}

/* Return where a member's bytes begin. */
static unsigned char *zip_member(const Zip *zip, const char *name, size_t *size) {
    size_t at = zip->directory;
    for (size_t n = 0; n < zip->members; ++n) {
        const unsigned char *entry = zip->content + at;
        if (zip->size - at < 46 || number(entry, 4) != 0x02014b50)
            refuse("its directory is damaged");
        size_t length = number(entry + 28, 2), rest = length + number(entry + 30, 2) + number(entry + 32, 2);
        if (zip->size - at - 46 < rest)
            refuse("its directory is damaged");
        at += 46 + rest;
        if (length != strlen(name) || memcmp(entry + 46, name, length) != 0)
            continue;
        *size = number(entry + 24, 4);
        if (number(entry + 10, 2) != 0 || number(entry + 8, 2) & 1 || number(entry + 20, 4) != *size)
            refuse("it is compressed or encrypted, which golden data never is");
        size_t local = number(entry + 42, 4);
        if (local > zip->size || zip->size - local < 30 || number(zip->content + local, 4) != 0x04034b50)
            refuse("a member lies outside");
        size_t skip = 30 + number(zip->content + local + 26, 2) + (size_t)number(zip->content + local + 28, 2);
        if (skip > zip->size - local || *size > zip->size - local - skip)
            refuse("a member lies outside");
        return zip->content + local + skip;
    }
    refuse("a member is missing");
}

/* ---- the index */

static const Json *list_of(const Json *index, const char *key, JsonKind kind) {
    const Json *found = json_member(index, key);
    if (!found || found->kind != kind)
        refuse("its index is not what cnncc writes");
    return found;
}

static GoldenTensor *read_arrays(const Zip *zip, const Json *names, const char *role, int *count) {
    GoldenTensor *made = take(names->count, sizeof *made);
    *count = 0;
    for (const Json *name = names->first; name; name = name->next) {
        char member[32];
        size_t size;
        if (name->kind != JSON_STRING)
            refuse("its index is not what cnncc writes");
        for (int n = 0; n < *count; ++n)
            if (strcmp(made[n].name, name->text) == 0)
                refuse("its index names an array twice");
        snprintf(member, sizeof member, "%s.%d.npy", role, *count);
        GoldenTensor *array = &made[(*count)++];
        array->name = name->text;
        unsigned char *content = zip_member(zip, member, &size);
        const char *problem = npy_parse(content, size, &array->tensor);
        if (problem)
            refuse(problem);
    }
    return made;
}

static void read_limit(const Json *limit, GoldenTensor *output) {
    if (limit->kind != JSON_OBJECT || limit->count != 2)
        refuse("its index is not what cnncc writes");
    const Json *peak = json_member(limit, "max_scaled"), *relative = json_member(limit, "rel_l2");
    bool numbers = peak && relative && (peak->kind == JSON_FRACTION || peak->kind == JSON_INTEGER) &&
                   (relative->kind == JSON_FRACTION || relative->kind == JSON_INTEGER || relative->kind == JSON_NULL);
    if (!numbers || peak->fraction < 0 || relative->fraction < 0)
        refuse("its index is not what cnncc writes");
    output->limited = true;
    output->max_scaled = peak->fraction;
    output->rel_l2 = relative->kind == JSON_NULL ? -1 : relative->fraction;
}

Golden golden_parse(char *content, size_t size) {
    Zip zip = zip_open(content, size);
    size_t length;
    char *text = (char *)zip_member(&zip, "golden.json", &length);
    char *own = take(length + 1, 1); /* strings are decoded in place, and a NUL must follow */
    memcpy(own, text, length);
    const char *problem;
    const Json *index = json_parse(own, length, &problem);
    if (!index)
        refuse(problem);
    if (index->kind != JSON_OBJECT || index->count != 4 ||
        strcmp(list_of(index, "schema", JSON_STRING)->text, GOLDEN_SCHEMA) != 0)
        refuse("its schema is not '" GOLDEN_SCHEMA "'");
    Golden golden;
    golden.feeds = read_arrays(&zip, list_of(index, "feeds", JSON_LIST), "feed", &golden.feed_count);
    golden.outputs = read_arrays(&zip, list_of(index, "outputs", JSON_LIST), "output", &golden.output_count);
    if (zip.members != 1 + (size_t)golden.feed_count + (size_t)golden.output_count)
        refuse("its members are not those that its index names");
    const Json *limits = list_of(index, "limits", JSON_OBJECT);
    for (int n = 0; n < golden.output_count; ++n) {
        const Json *limit = json_member(limits, golden.outputs[n].name);
        if (limit)
            read_limit(limit, &golden.outputs[n]);
    }
    return golden;
}

/* ---- the comparison */

static bool differ(const Tensor *wanted, const Tensor *found) {
    if (wanted->dtype->code != FLOAT)
        return memcmp(wanted->data, found->data, wanted->bytes) != 0;
    size_t count = wanted->bytes / (wanted->dtype->bits / 8);
    for (size_t n = 0; n < count; ++n)
        if (tensor_number(wanted, n) != tensor_number(found, n))
            return true;
    return false;
}

bool golden_check(const GoldenTensor *golden, const Tensor *found, char *problem, size_t size) {
    const Tensor *wanted = &golden->tensor;
    bool alike = wanted->dtype == found->dtype && wanted->rank == found->rank &&
                 memcmp(wanted->shape, found->shape, (size_t)wanted->rank * sizeof *wanted->shape) == 0;
    if (!alike) {
        char is[1024], was[1024];
        tensor_describe(found->dtype, found->rank, found->shape, is, sizeof is);
        tensor_describe(wanted->dtype, wanted->rank, wanted->shape, was, sizeof was);
        snprintf(problem, size, "output '%s' is %s, not %s", golden->name, is, was);
        return false;
    }
    if (wanted->dtype->code != FLOAT || !golden->limited) {
        snprintf(problem, size, "output '%s' differs from the golden one", golden->name);
        return !differ(wanted, found);
    }
    size_t count = wanted->bytes / (wanted->dtype->bits / 8);
    double peak = 0, worst = 0, squares = 0, errors = 0;
    for (size_t n = 0; n < count; ++n) {
        double exact = tensor_number(wanted, n), got = tensor_number(found, n);
        if (!isfinite(exact) || !isfinite(got)) {
            if (exact == got || (isnan(exact) && isnan(got)))
                continue;
            snprintf(problem, size, "output '%s' is NaN or Inf where the golden one is not, or the other way round",
                     golden->name);
            return false;
        }
        peak = fmax(peak, fabs(exact));
    }
    peak = peak ? peak : 1;
    for (size_t n = 0; n < count; ++n) {
        double exact = tensor_number(wanted, n), error = (tensor_number(found, n) - exact) / peak;
        if (!isfinite(exact))
            continue;
        worst = fmax(worst, fabs(error));
        squares += exact / peak * (exact / peak);
        errors += error * error;
    }
    double relative = squares ? sqrt(errors / squares) : 0;
    snprintf(problem, size,
             "output '%s' is off by %.1e relative L2 and %.1e of its largest value; allowed are %.1e and %.1e",
             golden->name, relative, worst, golden->rel_l2 < 0 ? 0.0 : golden->rel_l2, golden->max_scaled);
    return worst <= golden->max_scaled && (golden->rel_l2 < 0 || relative <= golden->rel_l2);
}
