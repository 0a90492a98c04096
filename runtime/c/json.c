#include "json.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "stop.h"

enum { MOST_LEVELS = 16, MOST_VALUES = 1 << 20 }; /* a manifest has seven levels; ResNet-152's has 10,000 values */

typedef struct {
    char *at;
    const char *end;
    const char *problem;
    Json *values;
    size_t used, most;
} Reader;

static int fail(Reader *reader, const char *problem) {
    if (!reader->problem)
        reader->problem = problem;
    return 0;
}

static int accept(Reader *reader, char wanted) {
    if (*reader->at != wanted)
        return 0;
    ++reader->at;
    return 1;
}

static int expect(Reader *reader, char wanted, const char *problem) {
    return accept(reader, wanted) || fail(reader, problem);
}

static int hex(const char *digits) {
    int value = 0;
    for (int n = 0; n < 4; ++n) {
        const char *all = "0123456789abcdef", *found = digits[n] ? strchr(all, digits[n]) : NULL;
        if (!found)
            return -1;
        value = 16 * value + (int)(found - all);
    }
    return value;
}

/* What stands after a backslash, as Python's json writes it; 0 where it writes no such thing. */
static char unescaped(Reader *reader) {
    static const char from[] = "\"\\nrtbf", to[] = "\"\\\n\r\t\b\f";
    const char *found = *reader->at ? strchr(from, *reader->at) : NULL;
    if (found) {
        ++reader->at;
        return to[found - from];
    }
    int code = *reader->at == 'u' ? hex(reader->at + 1) : -1;
    if (code < 1 || code > 0x1f || strchr(to, code))
        return 0;
    reader->at += 5;
    return (char)code;
}

static const char *read_text(Reader *reader) {
    char *start, *into;
    if (!expect(reader, '"', "a string is missing"))
        return NULL;
    for (start = into = reader->at; *reader->at != '"';) {
        int length = utf8_length(reader->at);
        if (length == 0 || (unsigned char)*reader->at < 0x20) {
            fail(reader, "a string does not end, or is not UTF-8");
            return NULL;
        }
        if (accept(reader, '\\')) {
            if (!(*into++ = unescaped(reader))) {
                fail(reader, "a string holds an escape that does not belong there");
                return NULL;
            }
            continue;
        }
        memmove(into, reader->at, (size_t)length);
        into += length;
        reader->at += length;
    }
    ++reader->at;
    *into = '\0';
    return start;
}

static int digits(Reader *reader) {
    char *start = reader->at;
    while (*reader->at >= '0' && *reader->at <= '9')
        ++reader->at;
    return (int)(reader->at - start);
}

static int read_number(Reader *reader, Json *value) {
    char *start = reader->at;
    int fraction = 0;
    accept(reader, '-');
    if (!accept(reader, '0') && !digits(reader))
        return fail(reader, "there is something that is no JSON value");
    if (accept(reader, '.') && ++fraction && !digits(reader))
        return fail(reader, "a number ends after its point");
    if (accept(reader, 'e') && ++fraction) {
        if (!accept(reader, '-'))
            accept(reader, '+');
        if (!digits(reader))
            return fail(reader, "a number ends after its 'e'");
    }
    value->fraction = strtod(start, NULL); /* stops where we did: the program never leaves the C locale */
    if (!isfinite(value->fraction))
        return fail(reader, "a number is too large");
    value->kind = fraction ? JSON_FRACTION : JSON_INTEGER;
    if (!fraction) {
        if (fabs(value->fraction) >= 9e18)
            return fail(reader, "a number is too large");
        value->integer = strtoll(start, NULL, 10);
    }
    return 1;
}

static int word(Reader *reader, const char *wanted) {
    size_t length = strlen(wanted);
    if (strncmp(reader->at, wanted, length) != 0)
        return fail(reader, "there is something that is no JSON value");
    reader->at += length;
    return 1;
}

static Json *read_value(Reader *reader, int level);

/* The members of a list or an object, whose opening bracket was read. */
static int read_members(Reader *reader, Json *value, char closing, int level) {
    Json **link = &value->first;
    const char *before = NULL;
    while (!(value->count == 0 && accept(reader, closing))) {
        const char *key = NULL;
        if (closing == '}') {
            if (!(key = read_text(reader)) || !expect(reader, ':', "a key has no value"))
                return 0;
            if (before && strcmp(before, key) >= 0)
                return fail(reader, "keys are repeated or out of order");
            before = key;
        }
        Json *member = read_value(reader, level + 1);
        if (!member)
            return 0;
        member->key = key;
        *link = member;
        link = &member->next;
        ++value->count;
        if (accept(reader, closing))
            break;
        if (!expect(reader, ',', "a comma or a closing bracket is missing"))
            return 0;
    }
    return 1;
}

static Json *read_value(Reader *reader, int level) {
    if (reader->used == reader->most || level == MOST_LEVELS) {
        fail(reader, "it holds too many values, or too many within each other");
        return NULL;
    }
    Json *value = &reader->values[reader->used++];
    int good;
    switch (*reader->at) {
    case '{':
    case '[': {
        char closing = *reader->at++ == '{' ? '}' : ']';
        value->kind = closing == '}' ? JSON_OBJECT : JSON_LIST;
        good = read_members(reader, value, closing, level);
        break;
    }
    case '"':
        value->kind = JSON_STRING;
        good = (value->text = read_text(reader)) != NULL;
        break;
    case 't':
        value->kind = JSON_BOOL;
        value->integer = 1;
        good = word(reader, "true");
        break;
    case 'f':
        value->kind = JSON_BOOL;
        good = word(reader, "false");
        break;
    case 'n':
        value->kind = JSON_NULL;
        good = word(reader, "null");
        break;
    default:
        good = read_number(reader, value);
    }
    return good ? value : NULL;
}

const Json *json_parse(char *text, size_t size, const char **problem) {
    size_t most =
        size / 2 + 1 < MOST_VALUES ? size / 2 + 1 : MOST_VALUES; /* a value and what divides it take two bytes */
    Reader reader = {text, text + size, NULL, take(most, sizeof(Json)), 0, most};
    const Json *value = read_value(&reader, 0);
    if (value && (!accept(&reader, '\n') || reader.at != reader.end)) {
        fail(&reader, "it does not end with one newline");
        value = NULL;
    }
    *problem = reader.problem;
    return value;
}

const Json *json_member(const Json *object, const char *key) {
    for (const Json *member = object->first; member; member = member->next)
        if (strcmp(member->key, key) == 0)
            return member;
    return NULL;
}
