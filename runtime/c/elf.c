#include "elf.h"

#include <link.h>
#include <stdint.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

const char *elf_machine(int file) {
    static const struct {
        int number;
        const char *name;
    } machines[] = {{3, "i386"}, {40, "arm"}, {62, "x86_64"}, {183, "aarch64"}, {243, "riscv64"}};
    unsigned char head[64];
    if (pread(file, head, sizeof head, 0) != sizeof head)
        return NULL;
    bool little = head[5] == 1, shared = head[16] == 3 && head[17] == 0;
    if (memcmp(head, "\177ELF", 4) != 0 || !little || !shared)
        return NULL;
    for (unsigned n = 0; n < sizeof machines / sizeof *machines; ++n)
        if ((head[18] | head[19] << 8) == machines[n].number)
            return machines[n].name;
    return "an unknown machine";
}

bool elf_whole(int file) {
    ElfW(Ehdr) head;
    ElfW(Phdr) part;
    struct stat status;
    if (fstat(file, &status) || pread(file, &head, sizeof head, 0) != sizeof head)
        return false;
    uint64_t size = (uint64_t)status.st_size;
    for (unsigned n = 0; n < head.e_phnum; ++n) {
        if (head.e_phoff > size ||
            pread(file, &part, sizeof part, (off_t)(head.e_phoff + n * sizeof part)) != sizeof part)
            return false;
        if (part.p_type == PT_LOAD && (part.p_offset > size || part.p_filesz > size - part.p_offset))
            return false;
    }
    return true;
}
