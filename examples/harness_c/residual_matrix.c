/* A stranger in C: residual_matrix and its gradient, out of process, with nothing but libc.
 *
 *   cc -O2 -o residual_matrix residual_matrix.c -lm
 *   mhc-conformance run --impl 'exec:./residual_matrix'
 *
 * The protocol is docs/contract.md: one JSON line in, one out; tensors travel in safetensors files. The
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
    "\"dialects\": [\"paper\", \"maxtext-v1\", \"deepseek-v4\", \"deepseek-v4.1\", \"liger\", \"megatron\", "
    "\"transformer-engine\", \"xing-4\"], "
    "\"description\": \"C, float32 and float64\"}}";

enum axis { COLUMNS, ROWS, NEITHER };
enum guard { NONE, ADD, DENOMINATOR, CLIP };
struct settings { int softmax, first, guard, iterations, streams; double eps, limit; };

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

/* The index of the key's value among names, -1 for any other value. */
static int choice_of(const char *json, const char *key, const char *const *names, int count) {
    for (int k = 0; k < count; k++) if (is(json, key, names[k])) return k;
    return -1;
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

/* Where the k-th number of a row (ROWS) or of a column (COLUMNS) stands. */
static int at(int n, int axis, int line, int k) { return axis == ROWS ? line * n + k : k * n + line; }

static double sum(const double *p, int n, int axis, int line) {
    double total = 0;
    for (int k = 0; k < n; k++) total += p[at(n, axis, line, k)];
    return total;
}

/* What the iterations start from: a softmax over one axis, or exp of the logits less the largest of the axis first. */
static void start(const double *logits, double *q, const struct settings *s) {
    int n = s->streams, axis = s->softmax == NEITHER ? s->first : s->softmax;
    for (int line = 0; line < n; line++) {
        double largest = -INFINITY, total = 0;
        for (int k = 0; k < n; k++) largest = fmax(largest, logits[at(n, axis, line, k)]);
        for (int k = 0; k < n; k++) total += q[at(n, axis, line, k)] = exp(logits[at(n, axis, line, k)] - largest);
        for (int k = 0; k < n && s->softmax != NEITHER; k++) q[at(n, axis, line, k)] /= total;
    }
}

/* The gradient of the start: that of the softmax, or of exp, where the largest logit takes what all are lowered by. */
static void start_back(const double *logits, const double *q, double *gradient, const struct settings *s) {
    int n = s->streams, axis = s->softmax == NEITHER ? s->first : s->softmax;
    for (int line = 0; line < n; line++) {
        double total = 0;
        int largest = at(n, axis, line, 0);
        for (int k = 0; k < n; k++) {
            int here = at(n, axis, line, k);
            if (logits[here] > logits[largest]) largest = here;
            total += gradient[here] * q[here];
        }
        for (int k = 0; k < n; k++) {
            int here = at(n, axis, line, k);
            gradient[here] = q[here] * (gradient[here] - (s->softmax == NEITHER ? 0 : total));
        }
        if (s->softmax == NEITHER) gradient[largest] -= total;
    }
}

/* One pass along an axis; keeps what the way back needs. */
static void normalise(double *p, double *denominator, int *active, int n, int axis, const struct settings *s) {
    for (int line = 0; line < n; line++) {
        double total = sum(p, n, axis, line);
        active[line] = !(s->guard == CLIP && total <= s->eps);
        if (s->guard == ADD || s->guard == DENOMINATOR) total += s->eps;
        denominator[line] = active[line] ? total : s->eps;
        for (int k = 0; k < n; k++) p[at(n, axis, line, k)] /= denominator[line];
    }
}

/* H of one token and, where g is given, the gradient of sum(g * H) with respect to its logits. */
static void sinkhorn(const double *given, const double *g, double *H, double *gradient, const struct settings *s) {
    /* A softmax over the axis that is normalised first takes the place of the first pass. */
    int n = s->streams, size = n * n, skipped = s->softmax == s->first, passes = 2 * s->iterations - skipped;
    double *after_pass = malloc(sizeof(double) * (size_t)(passes * size)), *q = malloc(sizeof(double) * (size_t)size);
    double *denominators = malloc(sizeof(double) * (size_t)(passes * n));
    double *logits = malloc(sizeof(double) * (size_t)size);
    int *active = malloc(sizeof(int) * (size_t)(passes * n));
    if (!after_pass || !q || !denominators || !logits || !active) fail("memory");
    for (int k = 0; k < size; k++) {
        logits[k] = given[k]; /* fmin and fmax would take a NaN for the limit */
        if (s->limit > 0 && given[k] > s->limit) logits[k] = s->limit;
        if (s->limit > 0 && given[k] < -s->limit) logits[k] = -s->limit;
    }
    start(logits, q, s);
    for (int k = 0; k < size; k++) H[k] = q[k] + (s->guard == ADD ? s->eps : 0);
    for (int pass = 0; pass < passes; pass++) {
        int axis = (pass + skipped) % 2 ? !s->first : s->first;
        normalise(H, denominators + pass * n, active + pass * n, n, axis, s);
        memcpy(after_pass + pass * size, H, sizeof(double) * (size_t)size);
    }
    if (g) {
        memcpy(gradient, g, sizeof(double) * (size_t)size);
        for (int pass = passes - 1; pass >= 0; pass--) {
            int axis = (pass + skipped) % 2 ? !s->first : s->first;
            const double *value = after_pass + pass * size;
            for (int line = 0; line < n; line++) {
                double total = 0;
                for (int k = 0; k < n; k++) total += gradient[at(n, axis, line, k)] * value[at(n, axis, line, k)];
                for (int k = 0; k < n; k++) {
                    double *here = gradient + at(n, axis, line, k);
                    *here = (*here - (active[pass * n + line] ? total : 0)) / denominators[pass * n + line];
                }
            }
        }
        start_back(logits, q, gradient, s);
        for (int k = 0; k < size && s->limit > 0; k++) if (fabs(given[k]) > s->limit) gradient[k] = 0;
    }
    free(after_pass); free(q); free(denominators); free(logits); free(active);
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
    static const char *const AXES[] = {"columns", "rows", "none"}, *const ORDERS[] = {"columns-first", "rows-first"};
    static const char *const GUARDS[] = {"none", "add", "denominator", "clip"};
    struct settings s = {choice_of(line, "softmax", AXES, 3), choice_of(line, "order", ORDERS, 2),
                         choice_of(line, "guard", GUARDS, 4), (int)number_of(line, "iterations"),
                         (int)number_of(line, "streams"), number_of(line, "eps"), number_of(line, "logit_limit")};
    if (!is(line, "residual", "sinkhorn") || s.softmax < 0 || s.first < 0 || s.guard < 0) {
        printf("{\"id\": \"%s\", \"status\": \"refused\", "
               "\"reason\": \"only Sinkhorn, with a softmax, an order and a guard that it knows\"}\n", id);
        free(id); free(input); free(output);
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
