#include "sha256.h"

#include <string.h>

/* The first 32 bits of the fractional parts of the cube roots of the first 64 primes (FIPS 180-4, 4.2.2). */
static const uint32_t K[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

static uint32_t rotated(uint32_t word, int bits) { return word >> bits | word << (32 - bits); }

/* One round. Words are not moved on by one: the next round calls them by the next names, so they stay in registers. */
#define ROUND(a, b, c, d, e, f, g, h, n)                                                     \
    do {                                                                                     \
        h += (rotated(e, 6) ^ rotated(e, 11) ^ rotated(e, 25)) + (g ^ (e & (f ^ g)));        \
        h += K[n] + w[n];                                                                    \
        d += h;                                                                              \
        h += (rotated(a, 2) ^ rotated(a, 13) ^ rotated(a, 22)) + ((a & b) | (c & (a | b)));  \
    } while (0)

static void mix(uint32_t state[8], const uint8_t *block) {
    uint32_t w[64];
    for (int n = 0; n < 16; ++n, block += 4)
        w[n] = (uint32_t)block[0] << 24 | (uint32_t)block[1] << 16 | (uint32_t)block[2] << 8 | block[3];
    for (int n = 16; n < 64; ++n) {
        uint32_t low = rotated(w[n - 15], 7) ^ rotated(w[n - 15], 18) ^ w[n - 15] >> 3;
        uint32_t high = rotated(w[n - 2], 17) ^ rotated(w[n - 2], 19) ^ w[n - 2] >> 10;
        w[n] = w[n - 16] + low + w[n - 7] + high;
    }
    uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
    uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
    for (int n = 0; n < 64; n += 8) {
        ROUND(a, b, c, d, e, f, g, h, n);
        ROUND(h, a, b, c, d, e, f, g, n + 1);
        ROUND(g, h, a, b, c, d, e, f, n + 2);
        ROUND(f, g, h, a, b, c, d, e, n + 3);
        ROUND(e, f, g, h, a, b, c, d, n + 4);
        ROUND(d, e, f, g, h, a, b, c, n + 5);
        ROUND(c, d, e, f, g, h, a, b, n + 6);
        ROUND(b, c, d, e, f, g, h, a, n + 7);
    }
    const uint32_t made[8] = {a, b, c, d, e, f, g, h};
    for (int n = 0; n < 8; ++n)
        state[n] += made[n];
}

void sha256_start(Sha256 *hash) {
    static const uint32_t start[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    memcpy(hash->state, start, sizeof start);
    hash->bytes = 0;
}

void sha256_add(Sha256 *hash, const void *data, size_t size) {
    const uint8_t *byte = data;
    while (size) {
        size_t filled = hash->bytes % 64, room = 64 - filled, count = size < room ? size : room;
        if (count == 64) {
            mix(hash->state, byte);
        } else {
            memcpy(hash->block + filled, byte, count);
            if (count == room)
                mix(hash->state, hash->block);
        }
        hash->bytes += count;
        byte += count;
        size -= count;
    }
}

void sha256_finish(Sha256 *hash, char hex[65]) {
    uint64_t bits = 8 * hash->bytes;
    uint8_t length[8];
    for (int n = 0; n < 8; ++n)
        length[n] = (uint8_t)(bits >> (56 - 8 * n));
    sha256_add(hash, "\x80", 1);
    while (hash->bytes % 64 != 56)
        sha256_add(hash, "", 1);
    sha256_add(hash, length, sizeof length);
    for (int n = 0; n < 64; ++n)
        hex[n] = "0123456789abcdef"[hash->state[n / 8] >> (28 - n % 8 * 4) & 15];
    hex[64] = '\0';
}
