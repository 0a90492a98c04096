/* Arithmetic of 64 bits on machines of 32, where LLVM calls functions for it that a C compiler's library would bring.
 * Engines are linked with none; whoever loads them need not have it.
 *
 * Names and results are those of compiler-rt: numbers that do not fit become the nearest that does. They are hidden:
 * an engine neither lends them nor takes another's. Assembled as pool.ll is, see ../threads/generate.py.
 */

#include <stdint.h>

#define HIDDEN __attribute__((visibility("hidden")))

typedef struct {
    uint64_t quotient, rest;
} Division;

/* By shifts and subtractions, as by hand. Whole numbers of an ARM's 32-bit divider do not help with divisors beyond. */
static Division divided(uint64_t number, uint64_t divisor) {
    Division made = {0, 0};
    for (int bit = 63; bit >= 0; --bit) {
        uint64_t carry = made.rest >> 63;
        made.rest = made.rest << 1 | (number >> bit & 1);
        if (carry || made.rest >= divisor) {
            made.rest -= divisor;
            made.quotient |= (uint64_t)1 << bit;
        }
    }
    return made;
}

static uint64_t size_of(int64_t number) { return number < 0 ? -(uint64_t)number : (uint64_t)number; }

static int64_t with_sign(uint64_t size, int negative) { return (int64_t)(negative ? -size : size); }

HIDDEN uint64_t __udivdi3(uint64_t number, uint64_t divisor) { return divided(number, divisor).quotient; }

HIDDEN uint64_t __umoddi3(uint64_t number, uint64_t divisor) { return divided(number, divisor).rest; }

HIDDEN int64_t __divdi3(int64_t number, int64_t divisor) {
    return with_sign(divided(size_of(number), size_of(divisor)).quotient, (number < 0) != (divisor < 0));
}

HIDDEN int64_t __moddi3(int64_t number, int64_t divisor) {
    return with_sign(divided(size_of(number), size_of(divisor)).rest, number < 0);
}

/* Numbers of a significand and an exponent, towards zero; `places` bits of the significand lie behind the point at
 * exponent 0. */
typedef struct {
    uint64_t significand;
    int exponent, places, negative;
} Number;

static uint64_t whole(Number number) {
    if (number.exponent < 0)
        return 0;
    int left = number.exponent - number.places;
    return left < 0 ? number.significand >> -left : number.significand << left;
}

static int64_t fixed(Number number) {
    if (number.exponent >= 63)
        return number.negative ? INT64_MIN : INT64_MAX;
    return with_sign(whole(number), number.negative);
}

static uint64_t fixed_unsigned(Number number) {
    if (number.negative)
        return 0;
    return number.exponent >= 64 ? UINT64_MAX : whole(number);
}

static Number of_float(float value) {
    union {
        float value;
        uint32_t bits;
    } as = {value};
    Number made = {(as.bits & 0x7fffff) | 0x800000, (int)(as.bits >> 23 & 0xff) - 127, 23, as.bits >> 31};
    return made;
}

static Number of_double(double value) {
    union {
        double value;
        uint64_t bits;
    } as = {value};
    uint64_t one = (uint64_t)1 << 52;
    Number made = {(as.bits & (one - 1)) | one, (int)(as.bits >> 52 & 0x7ff) - 1023, 52, as.bits >> 63};
    return made;
}

HIDDEN int64_t __fixsfdi(float value) { return fixed(of_float(value)); }

HIDDEN int64_t __fixdfdi(double value) { return fixed(of_double(value)); }

HIDDEN uint64_t __fixunssfdi(float value) { return fixed_unsigned(of_float(value)); }

HIDDEN uint64_t __fixunsdfdi(double value) { return fixed_unsigned(of_double(value)); }

/* Both halves are exact; only their sum is rounded. */
HIDDEN double __floatdidf(int64_t number) {
    return (double)(int32_t)(number >> 32) * 4294967296.0 + (double)(uint32_t)number;
}

HIDDEN double __floatundidf(uint64_t number) {
    return (double)(uint32_t)(number >> 32) * 4294967296.0 + (double)(uint32_t)number;
}

/* Rounded once: of numbers that a double does not hold, the bits that it would round off become one, which tells a tie
 * from what is beyond it. */
static uint64_t sticky(uint64_t size) {
    enum { LOST = (1 << 11) - 1 };
    return size >> 53 && (size & LOST) ? (size & ~(uint64_t)LOST) | (LOST + 1) : size;
}

HIDDEN float __floatundisf(uint64_t number) { return (float)__floatundidf(sticky(number)); }

HIDDEN float __floatdisf(int64_t number) {
    float size = __floatundisf(size_of(number));
    return number < 0 ? -size : size;
}
