/* SHA-256 (FIPS 180-4). */
#ifndef CNNCC_SHA256_H
#define CNNCC_SHA256_H

#include <stddef.h>
#include <stdint.h>

typedef struct {
    uint32_t state[8];
    uint64_t bytes;
    uint8_t block[64];
} Sha256;

void sha256_start(Sha256 *hash);
void sha256_add(Sha256 *hash, const void *data, size_t size);
/* Write the digest as 64 hexadecimal digits and a NUL. */
void sha256_finish(Sha256 *hash, char hex[65]);

#endif
