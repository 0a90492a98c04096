/* cnncc-run: checks, runs and measures a bundle's engine on a device that has no Python. */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "cpu.h"
#include "elf.h"
#include "engine.h"
#include "golden.h"
#include "stop.h"

static const char HELP[] =
    "usage: cnncc-run BUNDLE [options]\n"
    "\n"
    "Checks a bundle that cnncc compiled, loads its engine, and runs it. The machine, the CPU's features and the\n"
    "digests of all that is loaded are checked before anything is.\n"
    "\n"
    "  --input FILE        an input as .npy; repeat in the model's order\n"
    "  --raw               the inputs are bare elements, little-endian and row-major\n"
    "  --output DIR        write the outputs there, as NUMBER-NAME.npy\n"
    "  --batch N           which of the batch sizes that were built  [default: the inputs', else the smallest]\n"
    "  --threads N         threads of the engine  [default: usable cores]\n"
    "  --verify            run the bundle's golden sample; exit with 1 where the outputs leave their tolerance\n"
    "  --bench SECONDS     run for so long; percentiles of the time of a run\n"
    "  --profile           the time of every kernel\n"
    "  --json              one JSON document on stdout\n"
    "  --allow-unverified  run also what has no passed parity check\n"
    "  --runtime DIR       holds libtvm_runtime.so  [default: CNNCC_TVM_RUNTIME, else the bundle's, else beside\n"
    "                      cnncc-run]\n"
    "  --features          say what this machine is and which CPU features engines may use here, and end\n"
    "  --help\n"
    "\n"
    "Exit codes:\n"
    "  0    done\n"
    "  1    a check failed (parity)\n"
    "  2    usage: a flag or an argument\n"
    "  3    this machine lacks something, or the engine was built for another one\n"
    "  4    the bundle or the data was refused\n"
    "  5    the engine failed\n";

enum { MOST_INPUTS = 256, MOST_THREADS = 1024, WARM_UPS = 3, PROFILED = 20, MOST_RUNS = 1 << 20 };
static const int64_t MOST_INPUT_BYTES = (int64_t)4 << 30, MOST_GOLDEN_BYTES = (int64_t)1 << 30;

typedef struct {
    const char *bundle, *output, *runtime;
    const char *inputs[MOST_INPUTS];
    int input_count, threads;
    int64_t batch; /* BATCH: not said */
    bool raw, verify, profile, json, allow_unverified;
    double bench; /* seconds; 0: no */
} Options;

/* ---- the command line */

static const char TRY_HELP[] = "`cnncc-run --help` lists what it takes";

static double number_of(const char *flag, const char *text, double least, double most, bool whole) {
    char *end;
    double value = strtod(text, &end);
    if (!*text || *end || !(value >= least && value <= most) || (whole && value != (double)(int64_t)value))
        stop(USAGE, TRY_HELP, "%s is '%s', not a %snumber from %g to %g", flag, text, whole ? "whole " : "", least,
             most);
    return value;
}

static bool listed_before(int number) {
    for (int n = 0; n < number; ++n)
        if (strcmp(cpu_known(n), cpu_known(number)) == 0 && cpu_has(cpu_known(n)))
            return true;
    return false;
}

static void print_features(bool json) {
    printf(json ? "{\"machine\": \"%s\", \"cores\": %d, \"features\": [" : "%s, %d cores:", cpu_machine(), cpu_cores());
    for (int n = 0, first = 1; cpu_known(n); ++n)
        if (cpu_has(cpu_known(n)) && !listed_before(n)) {
            printf(json ? "%s\"%s\"" : "%s%s", json ? (first ? "" : ", ") : " ", cpu_known(n));
            first = 0;
        }
    puts(json ? "]}" : "");
}

static Options parse(int count, char **words) {
    enum {
        INPUT = 256,
        RAW,
        OUTPUT,
        BATCHES,
        THREADS,
        VERIFY,
        BENCH,
        PROFILE,
        JSON,
        UNVERIFIED,
        RUNTIME,
        FEATURES,
        HELPS
    };
    static const struct option flags[] = {
        {"input", 1, NULL, INPUT},
        {"raw", 0, NULL, RAW},
        {"output", 1, NULL, OUTPUT},
        {"batch", 1, NULL, BATCHES},
        {"threads", 1, NULL, THREADS},
        {"verify", 0, NULL, VERIFY},
        {"bench", 1, NULL, BENCH},
        {"profile", 0, NULL, PROFILE},
        {"json", 0, NULL, JSON},
        {"runtime", 1, NULL, RUNTIME},
        {"features", 0, NULL, FEATURES},
        {"help", 0, NULL, HELPS},
        {"allow-unverified", 0, NULL, UNVERIFIED},
        {NULL, 0, NULL, 0},
    };
    Options made = {.batch = BATCH};
    bool features = false;
    opterr = 0;
    for (int n = 1; n < count; ++n)
        stop_as_json |= strcmp(words[n], "--json") == 0; /* before anything can be refused */
    for (int flag; (flag = getopt_long(count, words, "", flags, NULL)) != -1;)
        switch (flag) {
        case INPUT:
            if (made.input_count == MOST_INPUTS)
                stop(USAGE, TRY_HELP, "there are more than %d inputs", MOST_INPUTS);
            made.inputs[made.input_count++] = optarg;
            break;
        case RAW:
            made.raw = true;
            break;
        case OUTPUT:
            made.output = optarg;
            break;
        case BATCHES:
            made.batch = (int64_t)number_of("--batch", optarg, 1, 1 << 20, true);
            break;
        case THREADS:
            made.threads = (int)number_of("--threads", optarg, 1, MOST_THREADS, true);
            break;
        case VERIFY:
            made.verify = true;
            break;
        case BENCH:
            made.bench = number_of("--bench", optarg, 0.001, 86400, false);
            break;
        case PROFILE:
            made.profile = true;
            break;
        case JSON:
            made.json = true;
            break;
        case UNVERIFIED:
            made.allow_unverified = true;
            break;
        case RUNTIME:
            made.runtime = optarg;
            break;
        case FEATURES:
            features = true;
            break;
        case HELPS:
            fputs(HELP, stdout);
            exit(0);
        default:
            stop(USAGE, TRY_HELP, "'%s' is no flag, or lacks its value", words[optind - 1]);
        }
    if (features) {
        print_features(made.json);
        exit(0);
    }
    if (count - optind != 1)
        stop(USAGE, TRY_HELP, count == optind ? "no BUNDLE was given" : "more than one BUNDLE was given");
    made.bundle = words[optind];
    if (made.raw && !made.input_count)
        stop(USAGE, TRY_HELP, "--raw says how --input is to be read, and there is none");
    if (made.output && !made.input_count)
        stop(USAGE, TRY_HELP, "--output is for what the engine makes of --input, and there is none");
    return made;
}

/* ---- whether the engine fits: all of it before anything is loaded */

static void check_verdict(const Manifest *manifest) {
    static const char way_out[] = "run `cnncc verify` on it; --allow-unverified runs it all the same";
    if (strcmp(manifest->parity, "failed") == 0)
        stop(CHECK_FAILED, way_out, "the engine failed its parity check when it was built: its results are wrong");
    if (strcmp(manifest->parity, "passed") != 0)
        stop(CHECK_FAILED, way_out,
             "the engine's parity is '%s': nobody checked that it computes what the model computes", manifest->parity);
}

static void check_fit(const Manifest *manifest) {
    static const char way_out[] = "compile for this device: `cnncc targets` lists them";
    char lacking[512] = "";
    if (strcmp(manifest->format, FORMAT) != 0)
        stop(REFUSED, "use cnncc-runtime for Python", "the engine's format is '%s', this program runs " FORMAT,
             manifest->format);
    if (*manifest->gpu)
        stop(MISSING, way_out, "built for: a GPU of compute capability %s (%s), and this program runs engines for CPUs",
             manifest->gpu, manifest->device);
    if (strcmp(manifest->machine, cpu_machine()) != 0)
        stop(MISSING, way_out, "built for: %s (%s), found: %s", manifest->machine, manifest->device, cpu_machine());
    for (int n = 0; n < manifest->feature_count; ++n)
        if (!cpu_has(manifest->features[n])) {
            size_t used = strlen(lacking);
            snprintf(lacking + used, sizeof lacking - used, "%s%s", used ? ", " : "", manifest->features[n]);
        }
    if (*lacking)
        stop(MISSING, way_out, "built for: %s, found: a CPU which lacks %s",
             *manifest->cpu ? manifest->cpu : manifest->device, lacking);
    if (strcmp(manifest->abi, ABI) != 0)
        stop(MISSING, "compile again with the cnncc that matches this cnncc-run", "built for: %s, found: %s",
             *manifest->abi ? manifest->abi : "(unknown)", ABI);
}

/* Open a library of the bundle, which is of this machine. */
static int open_library(int folder, const FileRecord *record) {
    int file = file_open_listed(folder, record);
    const char *machine = elf_machine(file);
    if (!machine)
        stop(REFUSED, "build the bundle again", "'%s' is not a shared library", record->name);
    if (strcmp(machine, cpu_machine()) != 0)
        stop(MISSING, "compile for this device: `cnncc targets` lists them", "'%s' was built for: %s, found: %s",
             record->name, machine, cpu_machine());
    if (!elf_whole(file))
        stop(REFUSED, "build the bundle again", "'%s' is cut off", record->name);
    return file;
}

/* ---- inputs */

static const Entry *entry_of(const Manifest *manifest, int64_t batch) {
    for (int n = 0; n < manifest->entry_count; ++n)
        if (manifest->entries[n].batch == batch)
            return &manifest->entries[n];
    return NULL;
}

/* Write the batch sizes that were built. */
static const char *built(const Manifest *manifest) {
    static char text[512];
    size_t used = 0;
    for (int n = 0; n < manifest->entry_count && used < sizeof text; ++n)
        used += (size_t)snprintf(text + used, sizeof text - used, "%s%lld", n ? ", " : "",
                                 (long long)manifest->entries[n].batch);
    return text;
}

static const Entry *default_entry(const Manifest *manifest, int64_t batch) {
    const Entry *least = manifest->entries, *found = entry_of(manifest, batch);
    if (batch != BATCH && !found)
        stop(USAGE, "give one of those, or compile with that size too",
             "batch size %lld was not built, the bundle holds %s", (long long)batch,
             least->batch ? built(manifest) : "none: the model has no batch dimension");
    for (int n = 1; n < manifest->entry_count; ++n)
        if (manifest->entries[n].batch < least->batch)
            least = &manifest->entries[n];
    return found ? found : least;
}

static void bind(const Spec *spec, int64_t batch, Tensor *tensor) {
    tensor->dtype = spec->dtype;
    tensor->rank = spec->rank;
    for (int axis = 0; axis < spec->rank; ++axis)
        tensor->shape[axis] = spec->shape[axis] == BATCH ? batch : spec->shape[axis];
    if (!tensor_bytes(tensor->dtype, tensor->rank, tensor->shape, &tensor->bytes))
        stop(REFUSED, "build the bundle again", "input '%s' is larger than any memory", spec->name);
}

/* Refuse an array that does not fit; `batch` becomes its batch size where it was not known. */
static void admit(const Spec *spec, const Tensor *tensor, int64_t *batch) {
    char is[1024], wants[1024];
    bool fits = tensor->dtype == spec->dtype && tensor->rank == spec->rank;
    for (int axis = 0; fits && axis < spec->rank; ++axis) {
        if (spec->shape[axis] == BATCH && *batch == BATCH)
            *batch = tensor->shape[axis];
        fits = tensor->shape[axis] == (spec->shape[axis] == BATCH ? *batch : spec->shape[axis]);
    }
    if (fits)
        return;
    tensor_describe(tensor->dtype, tensor->rank, tensor->shape, is, sizeof is);
    tensor_describe(spec->dtype, spec->rank, spec->shape, wants, sizeof wants);
    stop(REFUSED, "give the type and shape that the model was compiled for", "input '%s' is %s, the model takes %s",
         spec->name, is, wants);
}

static void *aligned_copy(const Tensor *tensor) {
    void *made = take_aligned(ALIGNMENT, tensor->bytes);
    return tensor->bytes ? memcpy(made, tensor->data, tensor->bytes) : made;
}

static Tensor *read_inputs(const Manifest *manifest, const Options *options, int64_t *batch) {
    Tensor *made = take((size_t)manifest->input_count, sizeof *made);
    if (options->input_count != manifest->input_count)
        stop(REFUSED, "give an --input for each, in the model's order", "%d inputs were given, the model takes %d",
             options->input_count, manifest->input_count);
    if (options->raw)
        *batch = default_entry(manifest, *batch)->batch;
    for (int n = 0; n < manifest->input_count; ++n) {
        size_t size;
        const Spec *spec = &manifest->inputs[n];
        char *content = file_read_named(options->inputs[n], MOST_INPUT_BYTES, &size);
        if (options->raw) {
            bind(spec, *batch, &made[n]);
            if (size != made[n].bytes)
                stop(REFUSED, "is it of another type or batch size? --batch says which one",
                     "%s has %zu bytes, input '%s' %zu", options->inputs[n], size, spec->name, made[n].bytes);
            made[n].data = content;
            continue;
        }
        const char *problem = npy_parse(content, size, &made[n]);
        if (problem)
            stop(REFUSED, "write it by numpy.save, or give --raw", "%s: %s", options->inputs[n], problem);
        admit(spec, &made[n], batch);
        made[n].data = aligned_copy(&made[n]);
        free(content);
    }
    if (*batch == BATCH)
        *batch = default_entry(manifest, BATCH)->batch; /* the inputs have no batch dimension */
    if (!entry_of(manifest, *batch))
        stop(REFUSED, "pad or split the batch, or compile with that size too",
             "batch size %lld was not built, the bundle holds %s", (long long)*batch, built(manifest));
    return made;
}

static Tensor *zero_inputs(const Manifest *manifest, int64_t batch) {
    Tensor *made = take((size_t)manifest->input_count, sizeof *made);
    for (int n = 0; n < manifest->input_count; ++n) {
        bind(&manifest->inputs[n], batch, &made[n]);
        made[n].data = take_aligned(ALIGNMENT, made[n].bytes);
        memset(made[n].data, 0, made[n].bytes);
    }
    return made;
}

/* ---- what it does */

static FILE *document; /* of --json */
static bool as_json;

static void run(const Manifest *manifest, const Options *options, const Entry *entry, const Tensor *inputs) {
    engine_prepare(entry, inputs);
    Tensor *outputs = engine_outputs();
    int folder = -1;
    if (options->output) {
        if (mkdir(options->output, 0777) && errno != EEXIST)
            stop(MISSING, "give another --output", "%s cannot be made: %s", options->output, strerror(errno));
        folder = open(options->output, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        if (folder < 0)
            stop(MISSING, "give another --output", "%s is no folder: %s", options->output, strerror(errno));
    }
    fputs(", \"outputs\": [", document);
    for (int n = 0; n < manifest->output_count; ++n) {
        char file[128] = "", described[1024];
        const char *name = manifest->outputs[n].name;
        tensor_describe(outputs[n].dtype, outputs[n].rank, outputs[n].shape, described, sizeof described);
        if (options->output) { /* a name may hold anything */
            int used = snprintf(file, sizeof file, "%d-%.100s", n, name);
            for (char *at = file; *at; ++at)
                if (!strchr("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.", *at))
                    *at = '_';
            snprintf(file + used, sizeof file - (size_t)used, ".npy");
            npy_write(folder, file, &outputs[n]);
        }
        fputs(n ? ", {\"name\": " : "{\"name\": ", document);
        put_json(document, name);
        fprintf(document, ", \"type\": \"%s\", \"file\": ", described);
        if (*file)
            put_json(document, file);
        else
            fputs("null", document);
        fputc('}', document);
        if (!as_json) {
            put_plain(stdout, name);
            printf("  %s  %s\n", described, file);
        }
    }
    fputc(']', document);
}

/* Return how many of the golden outputs are wrong. */
static int verify(const Manifest *manifest, const Golden *golden) {
    int64_t batch = BATCH;
    Tensor *inputs = take((size_t)manifest->input_count, sizeof *inputs);
    for (int n = 0; n < manifest->input_count; ++n) {
        int feed = 0;
        while (feed < golden->feed_count && strcmp(golden->feeds[feed].name, manifest->inputs[n].name) != 0)
            ++feed;
        if (feed == golden->feed_count || golden->feed_count != manifest->input_count)
            stop(REFUSED, "build the bundle again", "the golden data is not of the inputs that the manifest lists");
        inputs[n] = golden->feeds[feed].tensor;
        admit(&manifest->inputs[n], &inputs[n], &batch);
        inputs[n].data = aligned_copy(&inputs[n]);
    }
    const Entry *entry =
        entry_of(manifest, batch == BATCH || !manifest->entries->batch ? manifest->entries->batch : batch);
    if (!entry)
        stop(REFUSED, "build the bundle again", "the golden data is of a batch size that was not built");
    engine_prepare(entry, inputs);
    Tensor *outputs = engine_outputs();
    int wrong = 0;
    fputs(", \"verify\": {\"problems\": [", document);
    for (int n = 0; n < golden->output_count; ++n) {
        char problem[2048];
        int output = 0;
        while (output < manifest->output_count && strcmp(golden->outputs[n].name, manifest->outputs[output].name) != 0)
            ++output;
        snprintf(problem, sizeof problem, "output '%s' is missing", golden->outputs[n].name);
        bool good = output < manifest->output_count &&
                    golden_check(&golden->outputs[n], &outputs[output], problem, sizeof problem);
        if (!good) {
            fputs(wrong++ ? ", " : "", document);
            put_json(document, problem);
            fputs("✗ ", stderr);
            put_plain(stderr, problem);
            fputc('\n', stderr);
        }
    }
    fprintf(document, "], \"passed\": %s}", wrong ? "false" : "true");
    if (!as_json)
        printf("golden sample  %s on %d outputs\n", wrong ? "failed" : "passed", golden->output_count);
    return wrong;
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static int ascending(const void *left, const void *right) {
    double a = *(const double *)left, b = *(const double *)right;
    return (a > b) - (a < b);
}

static void bench(double seconds, const char *what, int64_t batch) {
    double *times = take(MOST_RUNS, sizeof *times), started;
    int count = 0;
    for (int n = 0; n < WARM_UPS; ++n)
        engine_run();
    for (double begin = started = now(); count == 0 || (started - begin < seconds && count < MOST_RUNS);) {
        engine_run();
        double stopped = now();
        times[count++] = stopped - started;
        started = stopped;
    }
    qsort(times, (size_t)count, sizeof *times, ascending);
    /* the nearest rank: at least so many per cent of the runs took no longer */
    double p50 = times[(count * 50LL + 99) / 100 - 1], p90 = times[(count * 90LL + 99) / 100 - 1],
           p99 = times[(count * 99LL + 99) / 100 - 1];
    fprintf(
        document,
        ", \"bench\": {\"count\": %d, \"input\": \"%s\", \"batch\": %lld, \"p50\": %.9f, \"p90\": %.9f, \"p99\": %.9f}",
        count, what, (long long)batch, p50, p90, p99);
    if (!as_json)
        printf("%d runs on %s  p50 %.3f ms  p90 %.3f ms  p99 %.3f ms\n", count, what, 1e3 * p50, 1e3 * p90, 1e3 * p99);
}

static void show_profile(void) {
    int count;
    KernelTime *times = engine_profile(PROFILED, &count);
    fputs(", \"profile\": [", document);
    for (int n = 0; n < count; ++n) {
        fputs(n ? ", {\"kernel\": " : "{\"kernel\": ", document);
        put_json(document, times[n].kernel);
        fprintf(document, ", \"seconds\": %.9f}", times[n].seconds);
        if (!as_json) {
            printf("%12.3f ms  ", 1e3 * times[n].seconds);
            put_plain(stdout, times[n].kernel);
            putchar('\n');
        }
    }
    fputc(']', document);
}

int main(int count, char **words) {
    Options options = parse(count, words);
    char *text = NULL;
    size_t size = 0;
    as_json = options.json;
    document = open_memstream(&text, &size);
    if (!document)
        stop(MISSING, "close other programs", "no memory is left");

    double begin = now();
    int folder = folder_open(options.bundle);
    Manifest manifest = manifest_read(folder);
    if (!options.allow_unverified)
        check_verdict(&manifest);
    check_fit(&manifest);
    int64_t batch = options.batch == BATCH ? BATCH : default_entry(&manifest, options.batch)->batch;
    int engine = open_library(folder, manifest.engine);
    void *weights =
        manifest.weights_file ? file_map(file_open_listed(folder, manifest.weights_file), manifest.weights_file) : NULL;
    Golden golden = {0};
    if (options.verify) {
        if (!manifest.golden)
            stop(REFUSED, "compile it again", "the bundle holds no golden data to verify by");
        golden =
            golden_parse(file_read_listed(folder, manifest.golden, MOST_GOLDEN_BYTES), (size_t)manifest.golden->size);
    }
    Tensor *inputs = options.input_count ? read_inputs(&manifest, &options, &batch) : NULL;
    const char *named = engine_runtime_named(options.runtime);
    engine_load_runtime(named, named || !manifest.runtime ? -1 : open_library(folder, manifest.runtime));
    int threads = options.threads ? options.threads : cpu_cores();
    engine_open(&manifest, engine, weights, threads < MOST_THREADS ? threads : MOST_THREADS);
    fputs("{\"bundle\": ", document);
    put_json(document, manifest.name);
    fprintf(document, ", \"threads\": %d, \"opened\": %.6f", threads, now() - begin);

    int wrong = options.verify ? verify(&manifest, &golden) : 0;
    const Entry *entry = default_entry(&manifest, batch);
    const char *what = inputs ? "the input" : "zeros";
    if (inputs)
        run(&manifest, &options, entry, inputs);
    else if (options.bench > 0 || options.profile)
        engine_prepare(entry, zero_inputs(&manifest, entry->batch));
    if (options.bench > 0)
        bench(options.bench, what, entry->batch);
    if (options.profile)
        show_profile();
    if (!as_json && !inputs && !options.verify && !options.bench && !options.profile)
        printf("%s  opened in %.0f ms, %d threads\n", options.bundle, 1e3 * (now() - begin), threads);
    fputs("}\n", document);
    if (fclose(document))
        stop(MISSING, "close other programs", "no memory is left");
    put_document(as_json ? text : "", as_json ? size : 0);
    _Exit(wrong ? CHECK_FAILED : 0); /* the engine's threads sleep, and nobody needs what the libraries would tidy up */
}
