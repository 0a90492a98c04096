#include "cpu.h"

#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>

#if defined(__x86_64__)
#define MACHINE "x86_64"
#elif defined(__aarch64__)
#define MACHINE "aarch64"
#elif defined(__arm__)
#define MACHINE "arm"
#elif defined(__riscv) && __riscv_xlen == 64
#define MACHINE "riscv64"
#else
#error "no engines are built for this machine"
#endif

const char *cpu_machine(void) { return MACHINE; }

/* ---- features: the kernel's word for it → LLVM's name */

#if defined(__x86_64__)

static const char *const NAMES[][2] = {
    /* renamed */
    {"3dnowprefetch", "prfchw"},
    {"abm", "lzcnt"},
    {"avx512_bf16", "avx512bf16"},
    {"avx512_bitalg", "avx512bitalg"},
    {"avx512_fp16", "avx512fp16"},
    {"avx512_vbmi2", "avx512vbmi2"},
    {"avx512_vnni", "avx512vnni"},
    {"avx512_vp2intersect", "avx512vp2intersect"},
    {"avx512_vpopcntdq", "avx512vpopcntdq"},
    {"avx_ifma", "avxifma"},
    {"avx_ne_convert", "avxneconvert"},
    {"avx_vnni", "avxvnni"},
    {"avx_vnni_int16", "avxvnniint16"},
    {"avx_vnni_int8", "avxvnniint8"},
    {"amx_bf16", "amx-bf16"},
    {"amx_fp16", "amx-fp16"},
    {"amx_int8", "amx-int8"},
    {"amx_tile", "amx-tile"},
    {"bmi1", "bmi"},
    {"lahf_lm", "sahf"},
    {"pclmulqdq", "pclmul"},
    {"pni", "sse3"},
    {"rdrand", "rdrnd"},
    {"sha_ni", "sha"},
    {"sse4_1", "sse4.1"},
    {"sse4_2", "sse4.2"},
    {"user_shstk", "shstk"},
    /* implied */
    {"abm", "popcnt"},
    {"sse4_2", "crc32"},
    {"avx512f", "evex512"},
    {"lm", "64bit"},
    {"lm", "x87"},
    {"lm", "cmov"},
    /* the same */
    {"adx", "adx"},
    {"aes", "aes"},
    {"avx", "avx"},
    {"avx2", "avx2"},
    {"avx512bw", "avx512bw"},
    {"avx512cd", "avx512cd"},
    {"avx512dq", "avx512dq"},
    {"avx512f", "avx512f"},
    {"avx512ifma", "avx512ifma"},
    {"avx512vbmi", "avx512vbmi"},
    {"avx512vl", "avx512vl"},
    {"bmi2", "bmi2"},
    {"cldemote", "cldemote"},
    {"clflushopt", "clflushopt"},
    {"clwb", "clwb"},
    {"clzero", "clzero"},
    {"cmov", "cmov"},
    {"cx8", "cx8"},
    {"cx16", "cx16"},
    {"enqcmd", "enqcmd"},
    {"f16c", "f16c"},
    {"fma", "fma"},
    {"fma4", "fma4"},
    {"fsgsbase", "fsgsbase"},
    {"fxsr", "fxsr"},
    {"gfni", "gfni"},
    {"invpcid", "invpcid"},
    {"lwp", "lwp"},
    {"mmx", "mmx"},
    {"movbe", "movbe"},
    {"movdir64b", "movdir64b"},
    {"movdiri", "movdiri"},
    {"mwaitx", "mwaitx"},
    {"pku", "pku"},
    {"popcnt", "popcnt"},
    {"ptwrite", "ptwrite"},
    {"rdpid", "rdpid"},
    {"rdpru", "rdpru"},
    {"rdseed", "rdseed"},
    {"serialize", "serialize"},
    {"sse", "sse"},
    {"sse2", "sse2"},
    {"sse4a", "sse4a"},
    {"ssse3", "ssse3"},
    {"tbm", "tbm"},
    {"vaes", "vaes"},
    {"vpclmulqdq", "vpclmulqdq"},
    {"waitpkg", "waitpkg"},
    {"wbnoinvd", "wbnoinvd"},
    {"xop", "xop"},
    {"xsave", "xsave"},
    {"xsavec", "xsavec"},
    {"xsaveopt", "xsaveopt"},
    {"xsaves", "xsaves"},
};
enum { COUNT = sizeof NAMES / sizeof *NAMES };

/* The kernel's word, which leaves out what the system does not save between processes; of the first core, since all
 * cores of an x86 have the same. */
static const char *flags(void) {
    static char line[16384];
    FILE *file = line[0] ? NULL : fopen("/proc/cpuinfo", "r");
    if (!file)
        return line;
    while (fgets(line, sizeof line - 1, file) && strncmp(line, "flags", 5) != 0)
        line[0] = '\0';
    fclose(file);
    line[strcspn(line, "\n")] = '\0';
    strcat(line, " ");
    return line;
}

static bool has(int number) {
    char word[32];
    snprintf(word, sizeof word, " %s ", NAMES[number][0]);
    return strstr(flags(), word) != NULL;
}

static const char *name(int number) { return NAMES[number][1]; }

#else

/* Bits of AT_HWCAP, and after them those of AT_HWCAP2: what this very process may execute, as the kernel says it (or an
 * emulator: its /proc/cpuinfo would be that of another machine). */
static const struct {
    unsigned char bit, word;
    const char *name;
} BITS[] = {
#if defined(__aarch64__) /* Linux arch/arm64/include/uapi/asm/hwcap.h */
    {0, 0, "fp-armv8"},  {1, 0, "neon"},     {3, 0, "aes"},     {6, 0, "sha2"},       {7, 0, "crc"},    {8, 0, "lse"},
    {10, 0, "fullfp16"}, {12, 0, "rdm"},     {13, 0, "jsconv"}, {14, 0, "complxnum"}, {15, 0, "rcpc"},  {16, 0, "ccpp"},
    {17, 0, "sha3"},     {20, 0, "dotprod"}, {22, 0, "sve"},    {23, 0, "fp16fml"},   {27, 0, "flagm"}, {28, 0, "ssbs"},
    {29, 0, "sb"},       {30, 0, "pauth"},   {1, 1, "sve2"},    {13, 1, "i8mm"},      {14, 1, "bf16"},  {17, 1, "bti"},
    {23, 1, "sme"},      {37, 1, "sme2"},
#elif defined(__arm__)   /* Linux arch/arm/include/uapi/asm/hwcap.h */
    {6, 0, "vfp2"},       {12, 0, "neon"},  {13, 0, "vfp3"},     {14, 0, "vfp3d16"}, {16, 0, "vfp4"},
    {17, 0, "hwdiv-arm"}, {18, 0, "hwdiv"}, {23, 0, "fullfp16"}, {24, 0, "dotprod"}, {25, 0, "fp16fml"},
    {26, 0, "bf16"},      {27, 0, "i8mm"},  {0, 1, "aes"},       {3, 1, "sha2"},     {4, 1, "crc"},
    {5, 1, "sb"},         {6, 1, "ssbs"},
#else                    /* RISC-V: a bit for each letter */
    {0, 0, "a"}, {2, 0, "c"}, {3, 0, "d"}, {5, 0, "f"}, {8, 0, "i"}, {12, 0, "m"}, {21, 0, "v"},
#endif
};
enum { COUNT = sizeof BITS / sizeof *BITS };

static bool has(int number) {
    unsigned long long word = getauxval(BITS[number].word ? AT_HWCAP2 : AT_HWCAP);
    return word >> BITS[number].bit & 1;
}

static const char *name(int number) { return BITS[number].name; }

#endif

const char *cpu_known(int number) { return number < COUNT ? name(number) : NULL; }

bool cpu_has(const char *feature) {
    for (int n = 0; n < COUNT; ++n)
        if (strcmp(name(n), feature) == 0 && has(n))
            return true;
    return false;
}

/* ---- cores */

static bool read_line(const char *path, char *line, int size) {
    FILE *file = fopen(path, "r");
    bool good = file && fgets(line, size, file);
    if (file)
        fclose(file);
    return good;
}

/* Whether a lower hardware thread of the same core may be used too. */
static bool is_sibling(int cpu, const cpu_set_t *usable) {
    char path[96], line[256];
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
    if (!read_line(path, line, sizeof line))
        return false;
    for (char *at = line; *at >= '0' && *at <= '9';) { /* as 0-1,8 */
        long first = strtol(at, &at, 10), last = *at == '-' ? strtol(at + 1, &at, 10) : first;
        for (long other = first; other <= last && other < cpu; ++other)
            if (CPU_ISSET((size_t)other, usable))
                return true;
        at += *at == ',';
    }
    return false;
}

/* The tightest quota of this process's cgroup (version 2) and those around it, in whole cores; 0 without one. */
static int quota(void) {
    char line[3072], path[4096];
    FILE *file = fopen("/proc/self/cgroup", "r");
    int least = 0;
    bool found = false;
    while (file && !found && fgets(line, sizeof line, file))
        found = strncmp(line, "0::/", 4) == 0;
    if (file)
        fclose(file);
    if (!found)
        return 0;
    line[strcspn(line, "\n")] = '\0';
    for (char *end = line + strlen(line); end > line + 2; end = strrchr(line, '/')) {
        *end = '\0';
        char limit[64];
        snprintf(path, sizeof path, "/sys/fs/cgroup%s/cpu.max", line + 3);
        long long most, period;
        if (read_line(path, limit, sizeof limit) && sscanf(limit, "%lld %lld", &most, &period) == 2 && period > 0) {
            int cores = most / period > 1 ? (int)(most / period) : 1;
            least = least && least < cores ? least : cores;
        }
    }
    return least;
}

int cpu_cores(void) {
    cpu_set_t usable;
    if (sched_getaffinity(0, sizeof usable, &usable))
        return 1;
    int cores = 0, limit = quota();
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
        cores += CPU_ISSET((size_t)cpu, &usable) && !is_sibling(cpu, &usable);
    cores = cores > 1 ? cores : 1;
    return limit && limit < cores ? limit : cores;
}
