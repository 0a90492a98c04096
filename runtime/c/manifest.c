#include "manifest.h"

#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include "json.h"
#include "stop.h"

enum { MOST_BYTES = 16 << 20, MOST_EXPANSION = 8 };
static const int64_t MOST_SIZE = (int64_t)1 << 40;
static const char AGAIN[] =
    "build the bundle again with this cnncc, or run it with the cnncc-run of the cnncc that wrote it";

static void refuse(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));

static void refuse(const char *format, ...) {
    char why[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(why, sizeof why, format, arguments);
    va_end(arguments);
    stop(REFUSED, AGAIN, "the manifest is not valid: %s", why);
}

/* ---- fields */

static const Json *of_kind(const Json *value, JsonKind kind, const char *what) {
    static const char *const kinds[] = {"null",   "true or false", "a whole number", "a number",
                                        "a text", "a list",        "an object"};
    if (value->kind != kind)
        refuse("%s is %s, not %s", what, kinds[value->kind], kinds[kind]);
    return value;
}

static const Json *field(const Json *object, const char *key, JsonKind kind) {
    const Json *value = json_member(object, key);
    if (!value)
        refuse("'%s' is missing", key);
    return of_kind(value, kind, key);
}

static const char *text_of(const Json *object, const char *key) { return field(object, key, JSON_STRING)->text; }

static int64_t number_of(const Json *object, const char *key) { return field(object, key, JSON_INTEGER)->integer; }

/* Refuse an object of other fields than so many; each is asked for by name elsewhere. */
static const Json *with_fields(const Json *object, uint32_t count, const char *what) {
    of_kind(object, JSON_OBJECT, what);
    if (object->count != count)
        refuse("%s has %u fields, not %u", what, object->count, count);
    return object;
}

static const char **texts_of(const Json *object, const char *key, int *count) {
    const Json *list = field(object, key, JSON_LIST);
    const char **made = take(list->count, sizeof *made);
    *count = 0;
    for (const Json *one = list->first; one; one = one->next)
        made[(*count)++] = of_kind(one, JSON_STRING, key)->text;
    return made;
}

static int64_t batch_of(const char *key) {
    char *end;
    int64_t batch = strtoll(key, &end, 10);
    char again[32];
    snprintf(again, sizeof again, "%lld", (long long)batch);
    if (*end || strcmp(again, key) != 0 || batch < 0)
        refuse("'%s' is no batch size", key);
    return batch;
}

/* ---- files */

static bool is_safe(const char *name) {
    for (const char *at = name; *at; ++at)
        if ((unsigned char)*at < 0x20 || *at == 0x7f || *at == '\\')
            return false;
    for (const char *part = name;;) {
        size_t length = strcspn(part, "/");
        if (length == 0 || length > 255 || (part[0] == '.' && (length == 1 || (length == 2 && part[1] == '.'))))
            return false;
        if (!part[length])
            return strcmp(name, "manifest.json") != 0;
        part += length + 1;
    }
}

static bool is_digest(const char *text) {
    return strlen(text) == 71 && strncmp(text, "sha256:", 7) == 0 && strspn(text + 7, "0123456789abcdef") == 64;
}

static FileRecord file_of(const Json *record) {
    with_fields(record, 3, record->key);
    FileRecord made = {record->key, text_of(record, "role"), text_of(record, "sha256"), number_of(record, "size")};
    if (!is_safe(made.name) || !is_digest(made.sha256) || made.size < 0)
        refuse("the file '%s'", made.name);
    return made;
}

static const FileRecord *listed(const FileRecord *files, uint32_t count, const char *name) {
    for (uint32_t n = 0; n < count; ++n)
        if (strcmp(files[n].name, name) == 0)
            return &files[n];
    return NULL;
}

/* ---- tensors */

static const Dtype *dtype_of(const Json *object) {
    const Dtype *found = dtype_named(text_of(object, "dtype"));
    if (!found)
        refuse("the element type '%s'", text_of(object, "dtype"));
    return found;
}

/* Read a shape; sizes that are texts become BATCH. */
static int shape_of(const Json *object, int64_t least, bool symbols, int64_t *shape) {
    const Json *list = field(object, "shape", JSON_LIST);
    int rank = 0;
    if (list->count > MOST_AXES)
        refuse("a tensor of %u axes", list->count);
    for (const Json *one = list->first; one; one = one->next, ++rank) {
        bool symbol = symbols && one->kind == JSON_STRING;
        shape[rank] = symbol ? BATCH : of_kind(one, JSON_INTEGER, "a size")->integer;
        if (!symbol && (shape[rank] < least || shape[rank] >= MOST_SIZE))
            refuse("a tensor of size %lld", (long long)shape[rank]);
    }
    return rank;
}

static Spec *specs_of(const Json *object, const char *key, int *count) {
    const Json *list = field(object, key, JSON_LIST);
    Spec *made = take(list->count, sizeof *made);
    *count = 0;
    for (const Json *one = list->first; one; one = one->next) {
        with_fields(one, 3, key);
        Spec *spec = &made[(*count)++];
        spec->name = text_of(one, "name");
        spec->dtype = dtype_of(one);
        spec->rank = shape_of(one, 0, true, spec->shape);
        for (Spec *other = made; other < spec; ++other)
            if (strcmp(other->name, spec->name) == 0)
                refuse("%s of the same name", key);
    }
    return made;
}

/* ---- weights */

static void read_weight(const Json *record, Weight *weight) {
    with_fields(record, 4, "a weight");
    weight->offset = number_of(record, "offset");
    weight->dtype = dtype_of(record);
    weight->rank = shape_of(record, 1, false, weight->shape);
    if (!tensor_bytes(weight->dtype, weight->rank, weight->shape, &weight->bytes))
        refuse("a weight that is larger than any memory");
    weight->stored = weight->bytes;
    const Json *expansion = json_member(record, "expansion");
    if (!expansion)
        refuse("'expansion' is missing");
    if (expansion->kind != JSON_NULL) {
        with_fields(expansion, 2, "an expansion");
        weight->matrix = number_of(expansion, "matrix");
        weight->parts = number_of(expansion, "parts");
        if (weight->parts < 1)
            refuse("an expansion of %lld parts", (long long)weight->parts);
    }
}

static void check_expansion(const Manifest *manifest, Weight *weight) {
    const Weight *matrix =
        weight->matrix >= 0 && weight->matrix < manifest->weight_count ? &manifest->weights[weight->matrix] : NULL;
    bool plain = matrix && !matrix->parts && strcmp(matrix->dtype->name, "float64") == 0 && matrix->rank == 2;
    if (!plain || strcmp(weight->dtype->name, "float32") != 0)
        refuse("a weight cannot be made of what the file holds");
    int64_t rows = matrix->shape[0], columns = matrix->shape[1], elements = (int64_t)(weight->bytes / 4);
    bool whole = weight->parts <= elements / rows && elements % (weight->parts * rows) == 0;
    if (rows > MOST_EXPANSION * columns || !whole)
        refuse("a weight cannot be made of what the file holds");
    uint64_t each = (uint64_t)(elements / rows);
    if (each > (uint64_t)(PTRDIFF_MAX / 4 / columns))
        refuse("a weight that is larger than any memory");
    weight->stored = (size_t)(each * (uint64_t)columns * 4);
}

static void read_weights(const Json *record, Manifest *manifest) {
    const Json *list = field(record, "tensors", JSON_LIST);
    manifest->weights = take(list->count, sizeof *manifest->weights);
    for (const Json *one = list->first; one; one = one->next)
        read_weight(one, &manifest->weights[manifest->weight_count++]);
    for (Weight *weight = manifest->weights; weight < manifest->weights + manifest->weight_count; ++weight) {
        if (weight->parts)
            check_expansion(manifest, weight);
        int64_t size = manifest->weights_file->size;
        if (weight->offset < 0 || weight->offset % ALIGNMENT || weight->offset > size ||
            weight->stored > (uint64_t)(size - weight->offset))
            refuse("a weight does not lie in '%s' (%lld bytes)", manifest->weights_file->name, (long long)size);
    }
}

static void read_taken(const Json *list, const Manifest *manifest, Entry *entry) {
    of_kind(list, JSON_LIST, "the weights of an entry");
    int64_t *taken = take(list->count, sizeof *taken);
    for (const Json *one = list->first; one; one = one->next) {
        int64_t position = of_kind(one, JSON_INTEGER, "a weight's position")->integer;
        if (position < 0 || position >= manifest->weight_count)
            refuse("the weight %lld of %d", (long long)position, manifest->weight_count);
        taken[entry->taken_count++] = position;
    }
    entry->taken = taken;
}

/* ---- the engine */

static void read_entries(const Json *engine, const Json *batches, const Json *taken, Manifest *manifest) {
    const Json *entries =
        with_fields(field(engine, "entries", JSON_OBJECT), batches->count ? batches->count : 1, "entries");
    if (taken)
        with_fields(taken, entries->count, "the weights' entries");
    manifest->entries = take(entries->count, sizeof *manifest->entries);
    for (const Json *one = entries->first; one; one = one->next) {
        Entry *entry = &manifest->entries[manifest->entry_count++];
        entry->batch = batch_of(one->key);
        entry->function = of_kind(one, JSON_STRING, "an entry")->text;
        bool built = !batches->count && entry->batch == 0;
        for (const Json *size = batches->first; size; size = size->next)
            built |= of_kind(size, JSON_INTEGER, "a batch size")->integer == entry->batch;
        if (!built)
            refuse("an entry for the batch size %s, which was not built", one->key);
        const Json *weights = taken ? json_member(taken, one->key) : NULL;
        if (taken && !weights)
            refuse("no weights for the batch size %s", one->key);
        if (weights)
            read_taken(weights, manifest, entry);
    }
}

static void read_engine(const Json *root, const FileRecord *files, uint32_t file_count, Manifest *manifest) {
    const Json *engine = with_fields(field(root, "engine", JSON_OBJECT), 7, "the engine");
    const char *name = text_of(engine, "file"), *refit = text_of(engine, "refit");
    manifest->format = text_of(engine, "format");
    manifest->abi = text_of(engine, "abi");
    const Json *dla = json_member(engine, "dla"), *weights = json_member(engine, "weights"), *taken = NULL;
    if (!dla || (dla->kind != JSON_NULL && dla->kind != JSON_INTEGER) || !weights)
        refuse("the engine's 'dla' or 'weights'");
    manifest->engine = listed(files, file_count, name);
    if (!manifest->engine || (*refit && !listed(files, file_count, refit)))
        refuse("the engine '%s' is not among the files", name);
    if (weights->kind != JSON_NULL) {
        with_fields(weights, 3, "the weights");
        manifest->weights_file = listed(files, file_count, text_of(weights, "file"));
        if (!manifest->weights_file)
            refuse("the weights '%s' are not among the files", text_of(weights, "file"));
        read_weights(weights, manifest);
        taken = field(weights, "entries", JSON_OBJECT);
    }
    if (manifest->engine == manifest->weights_file || strcmp(name, refit) == 0)
        refuse("the engine '%s' is its weights too", name);
    read_entries(engine, field(root, "batches", JSON_LIST), taken, manifest);
}

static void read_target(const Json *root, Manifest *manifest) {
    const Json *target = with_fields(field(root, "target", JSON_OBJECT), 7, "the target");
    text_of(target, "name");
    text_of(target, "triple");
    manifest->device = text_of(target, "device");
    manifest->cpu = text_of(target, "cpu");
    manifest->machine = text_of(target, "machine");
    manifest->gpu = text_of(target, "gpu");
    manifest->features = texts_of(target, "features", &manifest->feature_count);
}

Manifest manifest_read(int folder) {
    Manifest manifest = {0};
    size_t size;
    const char *problem, *schema;
    char *content = file_read(folder, "manifest.json", MOST_BYTES, &size);
    const Json *root = json_parse(content, size, &problem);
    if (!root)
        refuse("%s", problem);
    of_kind(root, JSON_OBJECT, "it");
    if (strcmp(schema = text_of(root, "schema"), SCHEMA) != 0)
        stop(REFUSED, AGAIN, "the manifest's schema is '%s', this cnncc-run reads '%s'", schema, SCHEMA);
    with_fields(root, 16, "it");
    static const char *const unread[] = {"labels",        "layers",       "model",    "precision",
                                         "preprocessing", "reproducible", "toolchain"};
    for (size_t n = 0; n < sizeof unread / sizeof *unread; ++n)
        if (!json_member(root, unread[n]))
            refuse("'%s' is missing", unread[n]);
    manifest.name = text_of(root, "name");
    manifest.parity = text_of(root, "parity");
    if (strcmp(manifest.parity, "passed") != 0 && strcmp(manifest.parity, "failed") != 0 &&
        strcmp(manifest.parity, "pending") != 0)
        refuse("the parity '%s'", manifest.parity);
    const Json *listing = field(root, "files", JSON_OBJECT);
    FileRecord *files = take(listing->count, sizeof *files);
    uint32_t file_count = 0;
    for (const Json *one = listing->first; one; one = one->next)
        files[file_count++] = file_of(one);
    manifest.golden = listed(files, file_count, "golden.npz");
    manifest.runtime = listed(files, file_count, "libtvm_runtime.so");
    if (manifest.runtime && strcmp(manifest.runtime->role, "runtime") != 0)
        manifest.runtime = NULL;
    manifest.inputs = specs_of(root, "inputs", &manifest.input_count);
    manifest.outputs = specs_of(root, "outputs", &manifest.output_count);
    read_target(root, &manifest);
    read_engine(root, files, file_count, &manifest);
    return manifest;
}
