/* Just enough JSON for the vectors: objects, arrays, strings without escapes, unsigned numbers, words. */
#ifndef JSON_H
#define JSON_H

#include <ctype.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct json {
    char kind; /* { [ " 0 w */
    char *key, *text; /* text: of a string or a word */
    uint64_t number;
    struct json *child, *next;
};

static void json_fail(const char *at)
{
    fprintf(stderr, "no JSON: %.40s\n", at);
    exit(2);
}

static const char *json_blank(const char *s)
{
    while (isspace((unsigned char)*s))
        s++;
    return s;
}

static const char *json_text(const char *s, char **out)
{
    const char *end = strchr(s, '"');

    if (!end)
        json_fail(s);
    *out = strndup(s, (size_t)(end - s));
    return end + 1;
}

static const char *json_value(const char *s, struct json **out)
{
    struct json *v = calloc(1, sizeof *v), **tail = &v->child;
    char *end;

    *out = v;
    v->kind = *s;
    if (*s == '{' || *s == '[') {
        for (s = json_blank(s + 1); *s != '}' && *s != ']'; s = json_blank(s + (*s == ','))) {
            char *key = NULL;

            if (v->kind == '{') {
                s = json_blank(json_text(s + 1, &key));
                if (*s++ != ':')
                    json_fail(s);
            }
            s = json_blank(json_value(json_blank(s), tail));
            (*tail)->key = key;
            tail = &(*tail)->next;
        }
        return s + 1;
    }
    if (*s == '"')
        return json_text(s + 1, &v->text);
    if (isdigit((unsigned char)*s)) {
        v->kind = '0';
        v->number = strtoull(s, &end, 10);
        return end;
    }
    if (!isalpha((unsigned char)*s))
        json_fail(s);
    v->kind = 'w';
    for (end = (char *)s; isalpha((unsigned char)*end); end++)
        ;
    v->text = strndup(s, (size_t)(end - s));
    return end;
}

static const struct json *json_get(const struct json *object, const char *key)
{
    const struct json *v;

    for (v = object->child; v; v = v->next)
        if (v->key && !strcmp(v->key, key))
            return v;
    return NULL;
}

static const struct json *json_need(const struct json *object, const char *key)
{
    const struct json *v = json_get(object, key);

    if (!v)
        json_fail(key);
    return v;
}

static struct json *json_read(const char *path)
{
    FILE *file = fopen(path, "rb");
    char *text;
    long size;
    struct json *v;

    if (!file || fseek(file, 0, SEEK_END) || (size = ftell(file)) < 0) {
        perror(path);
        exit(2);
    }
    rewind(file);
    text = calloc(1, (size_t)size + 1);
    if (fread(text, 1, (size_t)size, file) != (size_t)size)
        json_fail(path);
    fclose(file);
    json_value(json_blank(text), &v);
    free(text);
    return v;
}

#endif
