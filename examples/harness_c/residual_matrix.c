/* A stranger in C: residual_matrix and its gradient, out of process, with nothing but libc.
 *
 *   cc -O2 -o residual_matrix residual_matrix.c -lm
 *   mhc-conformance run --impl 'exec:./residual_matrix'
 *
 * The protocol is conformance/CONTRACT.md: one JSON line in, one out; tensors travel in safetensors files. The
 * requests come from the suite and are regular, so that looking for a key is all the JSON that is needed.
 */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *GREETING =
    "{\"protocol\": \"mhc-conformance-harness/1\", \"name\": \"c-example\", \"capabilities\": {"
    "\"stages\": [\"residual_matrix\"], \"dtypes\": [\"float32\", \"float64\"], \"overrides\": null, "
    "\"dialects\": [\"paper\", \"deepseek-v4\", \"liger\", \"transformer-engine\"], "
    "\"description\": \"C, float32 and float64\"}}";

struct settings { int rows_first, add, clip, iterations, streams; double eps; };

static void fail(const char *what) {
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
}

/* The text after "key": in a JSON object, or NULL. */
static const char *after(const char *json, const char *key) {
    char quoted[64];
    snprintf(quoted, sizeof quoted, "\"%s\":", key);
    const char *found = strstr(json, quoted);
    if (!found) return NULL;
    found += strlen(quoted);
    return found + strspn(found, " ");
}

static char *text_of(const char *json, const char *key) {
    const char *value = after(json, key);
    if (!value || *value != '"') return NULL;
    size_t length = strcspn(value + 1, "\"");
    return strndup(value + 1, length);
}

static int is(const char *json, const char *key, const char *expected) {
    char *value = text_of(json, key);
    int same = value && strcmp(value, expected) == 0;
    free(value);
    return same;
}

static double number_of(const char *json, const char *key) {
    const char *value = after(json, key);
    return value ? strtod(value, NULL) : 0.0;
}

/* A whole file; its first 8 bytes are the length of the safetensors header. */
static unsigned char *read_file(const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) fail(path);
    fseek(file, 0, SEEK_END);
    long size = ftell(file);
    rewind(file);
    unsigned char *bytes = malloc((size_t)size + 1);
    if (!bytes || fread(bytes, 1, (size_t)size, file) != (size_t)size) fail(path);
    bytes[size] = 0;
    fclose(file);
    return bytes;
}

static unsigned long long header_length(const unsigned char *bytes) {
    unsigned long long length = 0;
    for (int k = 7; k >= 0; k--) length = length << 8 | bytes[k];
    return length;
}

/* Elements of a tensor as double; its dtype and shape as they stand in the header. */
static double *tensor(unsigned char *bytes, const char *name, size_t *count, int *wide, char *shape, size_t room) {
    unsigned long long length = header_length(bytes);
    const char *header = (const char *)bytes + 8, *entry = after(header, name);
    if (!entry) return NULL;
    *wide = is(entry, "dtype", "F64");
    const char *listed = after(entry, "shape"), *offsets = after(entry, "data_offsets");
    snprintf(shape, room, "%.*s", (int)(strcspn(listed, "]") + 1), listed);
    char *rest;
    unsigned long long begin = strtoull(offsets + 1, &rest, 10), end = strtoull(rest + 1, NULL, 10);
    *count = (size_t)(end - begin) / (*wide ? 8 : 4);
    double *values = malloc(sizeof(double) * (*count + 1));
    const unsigned char *data = bytes + 8 + length + begin;
    for (size_t k = 0; k < *count; k++) {
        float narrow;
        if (*wide) memcpy(&values[k], data + 8 * k, 8);
        else { memcpy(&narrow, data + 4 * k, 4); values[k] = narrow; }
    }
    return values;
}

static double sum(const double *p, int n, int axis, int line) {
    double total = 0;
    for (int k = 0; k < n; k++) total += axis ? p[line * n + k] : p[k * n + line];
    return total;
}

/* One pass along an axis (1: along rows); keeps what the way back needs. */
static void normalise(double *p, double *denominator, int *active, int n, int axis, const struct settings *s) {
    for (int line = 0; line < n; line++) {
        double total = sum(p, n, axis, line);
        active[line] = !(s->clip && total <= s->eps);
        denominator[line] = s->add ? total + s->eps : active[line] ? total : s->eps;
        for (int k = 0; k < n; k++) p[axis ? line * n + k : k * n + line] /= denominator[line];
    }
}

/* H of one token and, where g is given, the gradient of sum(g * H) with respect to its logits. */
static void sinkhorn(const double *logits, const double *g, double *H, double *gradient, const struct settings *s) {
    int n = s->streams, size = n * n, passes = 2 * s->iterations - 1, first = s->rows_first;
    double *after_pass = malloc(sizeof(double) * (size_t)(passes * size)), *q = malloc(sizeof(double) * (size_t)size);
    double *denominators = malloc(sizeof(double) * (size_t)(passes * n));
    int *active = malloc(sizeof(int) * (size_t)(passes * n));
    for (int line = 0; line < n; line++) {
        double largest = -INFINITY, total = 0;
        for (int k = 0; k < n; k++) largest = fmax(largest, logits[first ? line * n + k : k * n + line]);
        for (int k = 0; k < n; k++) {
            int at = first ? line * n + k : k * n + line;
            total += q[at] = exp(logits[at] - largest);
        }
        for (int k = 0; k < n; k++) q[first ? line * n + k : k * n + line] /= total;
    }
    for (int k = 0; k < size; k++) H[k] = q[k] + (s->add ? s->eps : 0);
    for (int pass = 0; pass < passes; pass++) {
        normalise(H, denominators + pass * n, active + pass * n, n, pass % 2 ? first : !first, s);
        memcpy(after_pass + pass * size, H, sizeof(double) * (size_t)size);
    }
    if (g) {
        memcpy(gradient, g, sizeof(double) * (size_t)size);
        for (int pass = passes - 1; pass >= -1; pass--) {
            int axis = pass < 0 || pass % 2 ? first : !first;
            const double *value = pass < 0 ? q : after_pass + pass * size;
            for (int line = 0; line < n; line++) {
                double total = 0;
                for (int k = 0; k < n; k++) {
                    int at = axis ? line * n + k : k * n + line;
                    total += gradient[at] * value[at];
                }
                for (int k = 0; k < n; k++) {
                    int at = axis ? line * n + k : k * n + line;
                    if (pass < 0) gradient[at] = q[at] * (gradient[at] - total);
                    else gradient[at] = (gradient[at] - (active[pass * n + line] ? total : 0)) / denominators[pass * n + line];
                }
            }
        }
    }
    free(after_pass); free(q); free(denominators); free(active);
}

static void put(FILE *file, const double *values, size_t count, int wide) {
    for (size_t k = 0; k < count; k++) {
        float narrow = (float)values[k];
        if (wide) fwrite(&values[k], 8, 1, file);
        else fwrite(&narrow, 4, 1, file);
    }
}

static void answer(char *line) {
    char *id = text_of(line, "id"), *input = text_of(line, "input"), *output = text_of(line, "output");
    struct settings s = {is(line, "order", "rows-first"), is(line, "guard", "add"), is(line, "guard", "clip"),
                         (int)number_of(line, "iterations"), (int)number_of(line, "streams"), number_of(line, "eps")};
    if (!is(line, "residual", "sinkhorn")) {
        printf("{\"id\": \"%s\", \"status\": \"refused\", \"reason\": \"only Sinkhorn\"}\n", id);
        return;
    }
    unsigned char *bytes = read_file(input);
    size_t count = 0, given = 0, size = (size_t)(s.streams * s.streams);
    int wide, ignored;
    char shape[128], same[128];
    double *logits = tensor(bytes, "input/logits", &count, &wide, shape, sizeof shape);
    double *g = tensor(bytes, "cotangent/H", &given, &ignored, same, sizeof same);
    double *H = malloc(sizeof(double) * (count + 1)), *gradient = malloc(sizeof(double) * (count + 1));
    for (size_t k = 0; k < count; k += size) sinkhorn(logits + k, g ? g + k : NULL, H + k, gradient + k, &s);
    size_t width = count * (wide ? 8 : 4);
    char header[1024], second[256] = "";
    const char *dtype = wide ? "F64" : "F32";
    if (g) snprintf(second, sizeof second, ",\"gradient/logits\":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[%zu,%zu]}",
                    dtype, shape, width, 2 * width);
    int used = snprintf(header, sizeof header,
                        "{\"__metadata__\":{\"format\":\"mhc-conformance-result/1\",\"id\":\"%s\"},"
                        "\"output/H\":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[0,%zu]}%s}",
                        id, dtype, shape, width, second);
    while (used % 8) header[used++] = ' ';
    FILE *file = fopen(output, "wb");
    if (!file) fail(output);
    for (int k = 0; k < 8; k++) fputc((int)((unsigned long long)used >> 8 * k & 255), file);
    fwrite(header, 1, (size_t)used, file);
    put(file, H, count, wide);
    if (g) put(file, gradient, count, wide);
    if (fclose(file)) fail(output);
    printf("{\"id\": \"%s\", \"status\": \"done\"}\n", id);
    free(bytes); free(logits); free(g); free(H); free(gradient); free(id); free(input); free(output);
}

int main(void) {
    char *line = NULL;
    size_t room = 0;
    while (getline(&line, &room, stdin) > 0) {
        if (after(line, "protocol")) puts(GREETING);
        else answer(line);
        fflush(stdout);
    }
    free(line);
    return 0;
}
