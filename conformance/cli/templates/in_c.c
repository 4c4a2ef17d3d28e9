/* Manifold-constrained hyper-connections in C, for the suite. It passes as it is: put your own code in.
 *
 *     cc -O2 -o MODULE MODULE.c -lm
 *     mhc-conformance run --impl exec:./MODULE --dialect DIALECT
 *
 * or, in a Makefile:
 *
 *     MODULE: MODULE.c
 *             cc -O2 -o $@ $< -lm
 *
 * The suite starts the program and writes JSON objects to its standard input, one a line; the program answers each with
 * one line. The first line asks for a greeting, which says what the program can do. Each other line names a stage, the
 * dialect's parameters (they say what is to be computed, the dialect's name never does), a safetensors file with
 * "input/NAME", "weight/NAME" and, where gradients are asked for, "cotangent/NAME", and the file in which the program
 * writes "output/NAME" and "gradient/NAME". A gradient is a vector-Jacobian product, in the dtype and shape of its input.
 * What the program can't do it leaves out of its greeting, or answers with "status": "refused"; both are skipped and
 * never count against it. docs/contract.md of mhc-conformance has all of it.
 *
 * Everything is computed in double, token by token, and rounded once to the dtype of x. A function NAME_back takes the
 * gradients of what NAME returned, and adds to those of what NAME was given.
 */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *GREETING =
    "{\"protocol\": \"mhc-conformance-harness/1\", \"name\": \"MODULE\", \"capabilities\": {"
    "\"stages\": [\"STAGES\"], "
    "\"dialects\": [\"DIALECT\"], \"dtypes\": [\"float32\", \"float64\"], \"overrides\": null, \"description\": \"C\"}}";

enum { MOST_STREAMS = 16, MOST_COLUMNS = 256, MOST_TENSORS = 64 };
enum axis { COLUMNS, ROWS, NEITHER };
enum guard { UNGUARDED, ADD, DENOMINATOR, CLIP };
enum residual { SINKHORN, PERMUTATIONS, IDENTITY };
enum mix { IN_OUT, OUT_IN, KEPT };

/* The parameters of the dialect, by name in the request's "config". */
struct config {
    int n, C, columns; /* streams, dim, and the logits of H: n*n, n! or none */
    int residual, softmax, first, guard, iterations, mix, root, previous, has_norm_weight;
    double eps, limit, norm_eps, head_norm_eps, pre_eps, post_scale, post_eps;
};

/* A tensor of a file: its values as doubles, its dtype (float64 if wide) and its shape as the file writes it. */
struct tensor {
    char name[64], shape[128];
    double *values;
    size_t count;
    int wide;
};

/* The weights of one layer, or of a head; a gradient has the same form. */
struct weights { double *alpha[3], *scale[3], *beta[3], *norm; };

/* What the way back of a token's coefficients needs. */
struct token {
    double *normal, *flat, root, rms; /* x over its root mean square; that times w: [n*C] each */
    double h[3][MOST_COLUMNS], z[3][MOST_COLUMNS], pre[MOST_STREAMS], post[MOST_STREAMS], H[MOST_COLUMNS];
};

static struct tensor given[MOST_TENSORS], made[MOST_TENSORS];

static int given_count, made_count;

static void fail(const char *what) {
    fprintf(stderr, "%s: %s\n", what, errno ? strerror(errno) : "not as expected");
    exit(1);
}

static double *zeros(size_t count) {
    double *values = calloc(count + 1, sizeof(double));
    if (!values) fail("memory");
    return values;
}

/* The text after "key": in a JSON object, or NULL. */
static const char *after(const char *json, const char *key) {
    char quoted[80];
    snprintf(quoted, sizeof quoted, "\"%s\":", key);
    const char *found = strstr(json, quoted);
    if (!found) return NULL;
    found += strlen(quoted);
    return found + strspn(found, " ");
}

static int is(const char *json, const char *key, const char *expected) {
    const char *value = after(json, key);
    size_t length = strlen(expected);
    return value && *value == '"' && strncmp(value + 1, expected, length) == 0 && value[length + 1] == '"';
}

static char *text_of(const char *json, const char *key) {
    const char *value = after(json, key);
    if (!value || *value != '"') fail(key);
    return strndup(value + 1, strcspn(value + 1, "\""));
}

/* A number; what stands for it where it is null or absent. */
static double number_of(const char *json, const char *key, double otherwise) {
    const char *value = after(json, key);
    return value && *value != 'n' ? strtod(value, NULL) : otherwise;
}

/* Reads all tensors of a safetensors file: the length of a JSON header, the header, the values. */
static void read_tensors(const char *path) {
    FILE *file = fopen(path, "rb");
    unsigned char prefix[8];
    unsigned long long length = 0;
    if (!file || fread(prefix, 1, 8, file) != 8) fail(path);
    for (int k = 7; k >= 0; k--) length = length << 8 | prefix[k];
    char *header = malloc(length + 1);
    if (!header || fread(header, 1, length, file) != length) fail(path);
    header[length] = 0;
    given_count = 0;
    for (const char *entry = header; (entry = strstr(entry, "\"dtype\"")); entry++) {
        const char *end = entry; /* the name stands before: "NAME":{"dtype" */
        while (*end != ':') end--;
        const char *begin = end - 2;
        while (*begin != '"') begin--;
        struct tensor *t = &given[given_count++];
        if (given_count > MOST_TENSORS) fail("more tensors than expected");
        snprintf(t->name, sizeof t->name, "%.*s", (int)(end - begin - 2), begin + 1);
        const char *shape = after(entry, "shape"), *offsets = after(entry, "data_offsets");
        snprintf(t->shape, sizeof t->shape, "%.*s", (int)(strcspn(shape, "]") + 1), shape);
        char *rest;
        unsigned long long from = strtoull(offsets + 1, &rest, 10), to = strtoull(rest + 1, NULL, 10);
        t->wide = is(entry, "dtype", "F64");
        t->count = (size_t)(to - from) / (t->wide ? 8 : 4);
        t->values = zeros(t->count);
        fseek(file, (long)(8 + length + from), SEEK_SET);
        for (size_t k = 0; k < t->count; k++) {
            float narrow;
            int read = t->wide ? fread(&t->values[k], 8, 1, file) == 1 : fread(&narrow, 4, 1, file) == 1;
            if (!read) fail(path);
            if (!t->wide) t->values[k] = narrow;
        }
    }
    free(header);
    fclose(file);
}

static struct tensor *find(const char *kind, const char *name) {
    char whole[80];
    snprintf(whole, sizeof whole, "%s/%s", kind, name);
    for (int k = 0; k < given_count; k++) if (strcmp(given[k].name, whole) == 0) return &given[k];
    return NULL;
}

static double *values_of(const char *kind, const char *name) {
    struct tensor *t = find(kind, name);
    return t ? t->values : NULL;
}

/* A result, which is written at the end. */
static double *make(const char *kind, const char *name, const char *shape, size_t count, int wide) {
    struct tensor *t = &made[made_count++];
    if (made_count > MOST_TENSORS) fail("more results than expected");
    snprintf(t->name, sizeof t->name, "%s/%s", kind, name);
    snprintf(t->shape, sizeof t->shape, "%s", shape);
    t->count = count;
    t->wide = wide;
    return t->values = zeros(count);
}

/* The gradient of an input or a weight, with its shape and dtype: zeros as yet; NULL where the input isn't there. */
static double *gradient_of(const char *kind, const char *name) {
    struct tensor *t = find(kind, name);
    return t ? make("gradient", name, t->shape, t->count, t->wide) : NULL;
}

static void write_results(const char *path, const char *id) {
    size_t used = 0, room = 512 + 256 * (size_t)made_count, offset = 0;
    char *header = malloc(room + 8);
    if (!header) fail("memory");
    used += (size_t)snprintf(header, room, "{\"__metadata__\":{\"format\":\"mhc-conformance-result/1\",\"id\":\"%s\"}", id);
    for (int k = 0; k < made_count; k++) {
        size_t bytes = made[k].count * (made[k].wide ? 8 : 4);
        used += (size_t)snprintf(header + used, room - used, ",\"%s\":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[%zu,%zu]}",
                                 made[k].name, made[k].wide ? "F64" : "F32", made[k].shape, offset, offset + bytes);
        offset += bytes;
    }
    header[used++] = '}';
    while (used % 8) header[used++] = ' ';
    FILE *file = fopen(path, "wb");
    if (!file) fail(path);
    for (int k = 0; k < 8; k++) fputc((int)(used >> 8 * k & 255), file);
    fwrite(header, 1, used, file);
    for (int k = 0; k < made_count; k++) {
        for (size_t i = 0; i < made[k].count; i++) {
            float narrow = (float)made[k].values[i];
            if (made[k].wide) fwrite(&made[k].values[i], 8, 1, file);
            else fwrite(&narrow, 4, 1, file);
        }
        free(made[k].values);
    }
    for (int k = 0; k < given_count; k++) free(given[k].values);
    if (fclose(file)) fail(path);
    free(header);
    made_count = given_count = 0;
}

/* The shape [batch, seq, TAIL] of a result: the first two numbers of an input's shape, and others. */
static const char *shape_like(const struct tensor *t, const char *tail) {
    static char shape[128];
    long batch = 0, seq = 0;
    sscanf(t->shape, "[%ld,%ld", &batch, &seq);
    snprintf(shape, sizeof shape, "[%ld,%ld%s]", batch, seq, tail);
    return shape;
}

static struct config configuration(const char *line) {
    struct config c = {.n = (int)number_of(line, "streams", 0), .C = (int)number_of(line, "dim", 0)};
    c.residual = is(line, "residual", "sinkhorn") ? SINKHORN : is(line, "residual", "identity") ? IDENTITY : PERMUTATIONS;
    c.softmax = is(line, "softmax", "rows") ? ROWS : is(line, "softmax", "columns") ? COLUMNS : NEITHER;
    c.first = is(line, "order", "rows-first") ? ROWS : COLUMNS;
    c.guard = is(line, "guard", "add") ? ADD : is(line, "guard", "clip") ? CLIP
            : is(line, "guard", "denominator") ? DENOMINATOR : UNGUARDED;
    c.mix = is(line, "mix", "in-out") ? IN_OUT : is(line, "mix", "out-in") ? OUT_IN : KEPT;
    c.iterations = (int)number_of(line, "iterations", 0);
    c.root = is(line, "norm_eps_position", "root");
    c.previous = is(line, "pre_from", "previous");
    const char *norm_weight = after(line, "norm_weight");
    c.has_norm_weight = norm_weight && *norm_weight == 't';
    c.eps = number_of(line, "eps", 0);
    c.limit = number_of(line, "logit_limit", INFINITY);
    c.norm_eps = number_of(line, "norm_eps", 0);
    c.head_norm_eps = number_of(line, "head_norm_eps", c.norm_eps);
    c.pre_eps = number_of(line, "pre_eps", 0);
    c.post_scale = number_of(line, "post_scale", 0);
    c.post_eps = number_of(line, "post_eps", 0);
    c.columns = c.residual == SINKHORN ? c.n * c.n : c.residual == PERMUTATIONS ? 1 : 0;
    for (int k = 2; k <= c.n && c.residual == PERMUTATIONS; k++) c.columns *= k;
    return c;
}

/* Accurate relative to itself also where it is nearly 0. */
static double sigmoid(double z) { return z >= 0 ? 1 / (1 + exp(-z)) : exp(z) / (1 + exp(z)); }

/* Where the k-th number of a row (ROWS) or of a column (COLUMNS) stands. */
static int at(int n, int axis, int line, int k) { return axis == ROWS ? line * n + k : k * n + line; }

/* A softmax over the numbers at place, place + step, …. */
static void softmax(const double *logits, double *q, int count, int place, int step) {
    double largest = -INFINITY, total = 0;
    for (int k = 0; k < count; k++) largest = fmax(largest, logits[place + k * step]);
    for (int k = 0; k < count; k++) total += q[place + k * step] = exp(logits[place + k * step] - largest);
    for (int k = 0; k < count; k++) q[place + k * step] /= total;
}

static void softmax_back(const double *q, double *gradient, int count, int place, int step) {
    double total = 0;
    for (int k = 0; k < count; k++) total += gradient[place + k * step] * q[place + k * step];
    for (int k = 0; k < count; k++) gradient[place + k * step] = q[place + k * step] * (gradient[place + k * step] - total);
}

/* The permutation of this number in lexicographic order. */
static void permutation(int number, int n, int *p) {
    int left[MOST_STREAMS], count = 1;
    for (int k = 0; k < n; k++) left[k] = k;
    for (int k = 2; k < n; k++) count *= k; /* (n - 1)! */
    for (int k = 0; k < n; k++) {
        int chosen = number / count;
        number %= count;
        if (n - 1 - k > 0) count /= n - 1 - k;
        p[k] = left[chosen];
        memmove(left + chosen, left + chosen + 1, sizeof(int) * (size_t)(n - k - chosen - 1));
    }
}

static void permutations(const double *logits, const double *g, double *H, double *gradient, const struct config *c) {
    double q[MOST_COLUMNS];
    int p[MOST_STREAMS];
    softmax(logits, q, c->columns, 0, 1);
    memset(H, 0, sizeof(double) * (size_t)(c->n * c->n));
    for (int k = 0; k < c->columns; k++) {
        permutation(k, c->n, p);
        for (int i = 0; i < c->n; i++) H[i * c->n + p[i]] += q[k];
        if (!g) continue;
        gradient[k] = 0;
        for (int i = 0; i < c->n; i++) gradient[k] += g[i * c->n + p[i]];
    }
    if (g) softmax_back(q, gradient, c->columns, 0, 1);
}

/* What the iterations start from: a softmax, or exp of the logits less the largest of the axis that comes first. */
static void start(const double *logits, double *q, const struct config *c) {
    int n = c->n, axis = c->softmax == NEITHER ? c->first : c->softmax;
    for (int line = 0; line < n; line++) {
        double largest = -INFINITY;
        if (c->softmax != NEITHER) {
            softmax(logits, q, n, at(n, axis, line, 0), axis == ROWS ? 1 : n);
            continue;
        }
        for (int k = 0; k < n; k++) largest = fmax(largest, logits[at(n, axis, line, k)]);
        for (int k = 0; k < n; k++) q[at(n, axis, line, k)] = exp(logits[at(n, axis, line, k)] - largest);
    }
}

static void start_back(const double *logits, const double *q, double *gradient, const struct config *c) {
    int n = c->n, axis = c->softmax == NEITHER ? c->first : c->softmax;
    for (int line = 0; line < n; line++) {
        double total = 0;
        int largest = at(n, axis, line, 0);
        if (c->softmax != NEITHER) {
            softmax_back(q, gradient, n, largest, axis == ROWS ? 1 : n);
            continue;
        }
        for (int k = 0; k < n; k++) { /* the maximum is a part of the function; of equal ones the first counts */
            int here = at(n, axis, line, k);
            if (logits[here] > logits[largest]) largest = here;
            total += gradient[here] *= q[here];
        }
        gradient[largest] -= total;
    }
}

/* H of one token's logits and, where g is given, the gradient of sum(g * H): that of the passes as they are written. */
static void sinkhorn(const double *unclipped, const double *g, double *H, double *gradient, const struct config *c) {
    /* A softmax over the axis that is normalised first takes the place of the first pass. */
    int n = c->n, size = n * n, skipped = c->softmax == c->first, passes = 2 * c->iterations - skipped;
    double logits[MOST_COLUMNS], q[MOST_COLUMNS];
    double *steps = zeros((size_t)(passes * size)), *divisors = zeros((size_t)(passes * n));
    int *small = calloc((size_t)(passes * n) + 1, sizeof(int)); /* whether clip put eps in a sum's place */
    if (!small) fail("memory");
    for (int k = 0; k < size; k++) { /* a NaN stays */
        logits[k] = unclipped[k] > c->limit ? c->limit : unclipped[k] < -c->limit ? -c->limit : unclipped[k];
    }
    start(logits, q, c);
    for (int k = 0; k < size; k++) H[k] = q[k] + (c->guard == ADD ? c->eps : 0);
    for (int pass = 0; pass < passes; pass++) {
        int axis = (pass + skipped) % 2 ? !c->first : c->first;
        for (int line = 0; line < n; line++) {
            double total = 0;
            for (int k = 0; k < n; k++) total += H[at(n, axis, line, k)];
            small[pass * n + line] = c->guard == CLIP && total <= c->eps;
            if (c->guard == ADD || c->guard == DENOMINATOR) total += c->eps;
            divisors[pass * n + line] = small[pass * n + line] ? c->eps : total;
            for (int k = 0; k < n; k++) H[at(n, axis, line, k)] /= divisors[pass * n + line];
        }
        memcpy(steps + pass * size, H, sizeof(double) * (size_t)size);
    }
    if (g) {
        memcpy(gradient, g, sizeof(double) * (size_t)size);
        for (int pass = passes - 1; pass >= 0; pass--) {
            int axis = (pass + skipped) % 2 ? !c->first : c->first;
            const double *value = steps + pass * size;
            for (int line = 0; line < n; line++) {
                double total = 0;
                for (int k = 0; k < n; k++) total += gradient[at(n, axis, line, k)] * value[at(n, axis, line, k)];
                for (int k = 0; k < n; k++) {
                    double *here = gradient + at(n, axis, line, k);
                    *here = (*here - (small[pass * n + line] ? 0 : total)) / divisors[pass * n + line];
                }
            }
        }
        start_back(logits, q, gradient, c);
        for (int k = 0; k < size; k++) if (fabs(unclipped[k]) > c->limit) gradient[k] = 0;
    }
    free(steps); free(divisors); free(small);
}

/* H [n, n] of one token's logits and, where g is given, the gradient of sum(g * H) with respect to them. */
static void residual_matrix(const double *logits, const double *g, double *H, double *gradient, const struct config *c) {
    if (c->residual == PERMUTATIONS) permutations(logits, g, H, gradient, c);
    else if (c->residual == SINKHORN) sinkhorn(logits, g, H, gradient, c);
    else for (int k = 0; k < c->n * c->n; k++) H[k] = k % (c->n + 1) == 0;
}

/* x [n, C] over its root mean square. */
static void normed(const double *x, double eps, struct token *t, const struct config *c) {
    int size = c->n * c->C;
    double mean = 0;
    for (int k = 0; k < size; k++) mean += x[k] * x[k] / size;
    t->root = sqrt(c->root ? mean : mean + eps);
    t->rms = c->root ? t->root + eps : t->root;
    for (int k = 0; k < size; k++) t->normal[k] = x[k] / t->rms;
}

static void normed_back(const double *of_normal, const double *x, double *of_x, const struct token *t, const struct config *c) {
    int size = c->n * c->C;
    double along = 0;
    for (int k = 0; k < size; k++) along += of_normal[k] * t->normal[k] / size;
    for (int k = 0; k < size; k++) {
        double slope = t->root == 0 ? 0 : x[k] / t->root; /* of the root; a token of zeros has none */
        of_x[k] += (of_normal[k] - along * slope) / t->rms;
    }
}

/* The logits alpha_scale * (flat @ alpha) + beta of one projection. */
static void project(const double *flat, const struct weights *w, int kind, int columns, struct token *t, int size) {
    for (int m = 0; m < columns; m++) {
        double h = 0;
        for (int k = 0; k < size; k++) h += flat[k] * w->alpha[kind][k * columns + m];
        t->h[kind][m] = h;
        t->z[kind][m] = *w->scale[kind] * h + w->beta[kind][m];
    }
}

static void project_back(const double *of_z, const double *flat, double *of_flat, const struct weights *w,
                         struct weights *of_w, int kind, int columns, const struct token *t, int size) {
    for (int m = 0; m < columns; m++) {
        *of_w->scale[kind] += of_z[m] * t->h[kind][m];
        of_w->beta[kind][m] += of_z[m];
        for (int k = 0; k < size; k++) {
            of_w->alpha[kind][k * columns + m] += *w->scale[kind] * of_z[m] * flat[k];
            of_flat[k] += *w->scale[kind] * of_z[m] * w->alpha[kind][k * columns + m];
        }
    }
}

static struct token new_token(const struct config *c) {
    struct token t = {.normal = zeros((size_t)(c->n * c->C)), .flat = zeros((size_t)(c->n * c->C))};
    return t;
}

static void free_token(struct token *t) { free(t->normal); free(t->flat); }

/* pre [n], post [n] and H [n, n] of one token's x [n, C]. */
static void coefficients(const double *x, const struct weights *w, struct token *t, const struct config *c) {
    int n = c->n, size = n * c->C;
    normed(x, c->norm_eps, t, c);
    for (int k = 0; k < size; k++) t->flat[k] = t->normal[k] * (c->has_norm_weight ? w->norm[k] : 1);
    project(t->flat, w, 0, n, t, size);
    project(t->flat, w, 1, n, t, size);
    if (c->columns) project(t->flat, w, 2, c->columns, t, size);
    for (int i = 0; i < n; i++) {
        t->pre[i] = sigmoid(t->z[0][i]) + c->pre_eps;
        t->post[i] = c->post_scale * sigmoid(t->z[1][i]) + c->post_eps;
    }
    residual_matrix(t->z[2], NULL, t->H, NULL, c);
}

/* Adds to the gradients of x and of the weights; a gradient that is NULL is zero. */
static void coefficients_back(const double *of_pre, const double *of_post, const double *of_H, const double *x, double *of_x,
                              const struct weights *w, struct weights *of_w, struct token *t, const struct config *c) {
    int n = c->n, size = n * c->C;
    double of_z[MOST_COLUMNS], H[MOST_COLUMNS], *of_flat = zeros((size_t)size);
    for (int kind = 0; kind < 2; kind++) {
        const double *g = kind ? of_post : of_pre;
        if (!g) continue;
        for (int i = 0; i < n; i++) {
            double slope = sigmoid(t->z[kind][i]) * sigmoid(-t->z[kind][i]);
            of_z[i] = g[i] * slope * (kind ? c->post_scale : 1);
        }
        project_back(of_z, t->flat, of_flat, w, of_w, kind, n, t, size);
    }
    if (of_H && c->columns) {
        residual_matrix(t->z[2], of_H, H, of_z, c);
        project_back(of_z, t->flat, of_flat, w, of_w, 2, c->columns, t, size);
    }
    for (int k = 0; k < size && c->has_norm_weight; k++) {
        of_w->norm[k] += of_flat[k] * t->normal[k];
        of_flat[k] *= w->norm[k];
    }
    normed_back(of_flat, x, of_x, t, c);
    free(of_flat);
}

/* u = sum_i gates_i x_i of one token. */
static void pre_mix(const double *gates, const double *x, double *u, const struct config *c) {
    for (int k = 0; k < c->C; k++) {
        u[k] = 0;
        for (int i = 0; i < c->n; i++) u[k] += gates[i] * x[i * c->C + k];
    }
}

static void pre_mix_back(const double *of_u, const double *gates, const double *x, double *of_gates, double *of_x,
                         const struct config *c) {
    for (int i = 0; i < c->n; i++) {
        for (int k = 0; k < c->C; k++) {
            of_gates[i] += of_u[k] * x[i * c->C + k];
            of_x[i * c->C + k] += of_u[k] * gates[i];
        }
    }
}

/* The weight of input stream i in output stream j: H[i, j], or H[j, i] for out-in. */
static int weight_at(int i, int j, const struct config *c) { return c->mix == IN_OUT ? i * c->n + j : j * c->n + i; }

/* out_j = post_j y + sum_i H[i, j] x_i of one token. */
static void post_mix(const double *y, const double *x, const double *post, const double *H, double *out, const struct config *c) {
    for (int j = 0; j < c->n; j++) {
        for (int k = 0; k < c->C; k++) {
            double mixed = c->mix == KEPT ? x[j * c->C + k] : 0;
            for (int i = 0; i < c->n && c->mix != KEPT; i++) mixed += H[weight_at(i, j, c)] * x[i * c->C + k];
            out[j * c->C + k] = post[j] * y[k] + mixed;
        }
    }
}

static void post_mix_back(const double *of_out, const double *y, const double *x, const double *post, const double *H,
                          double *of_y, double *of_x, double *of_post, double *of_H, const struct config *c) {
    for (int j = 0; j < c->n; j++) {
        for (int k = 0; k < c->C; k++) {
            double g = of_out[j * c->C + k];
            of_y[k] += g * post[j];
            of_post[j] += g * y[k];
            if (c->mix == KEPT) of_x[j * c->C + k] += g;
            for (int i = 0; i < c->n && c->mix != KEPT; i++) {
                of_x[i * c->C + k] += g * H[weight_at(i, j, c)];
                of_H[weight_at(i, j, c)] += g * x[i * c->C + k];
            }
        }
    }
}

/* The weights of a layer, or of the one at an index of a stack; from "weight", or their gradients. */
static struct weights layer_weights(int gradients, int index, const struct config *c) {
    static const char *const KINDS[] = {"pre", "post", "res"};
    struct weights w = {0};
    int size = c->n * c->C;
    char name[32];
    for (int kind = 0; kind < (c->columns ? 3 : 2); kind++) {
        int columns = kind < 2 ? c->n : c->columns;
        double **places[] = {&w.alpha[kind], &w.scale[kind], &w.beta[kind]};
        static const char *const ENDS[] = {"alpha", "alpha_scale", "beta"};
        const int counts[] = {size * columns, 1, columns};
        for (int part = 0; part < 3; part++) {
            snprintf(name, sizeof name, "%s_%s", KINDS[kind], ENDS[part]);
            double *values = gradients ? gradient_of("weight", name) : values_of("weight", name);
            if (!values) fail(name);
            *places[part] = values + (size_t)index * (size_t)counts[part];
        }
    }
    if (c->has_norm_weight) {
        w.norm = gradients ? gradient_of("weight", "mhc_norm.scale") : values_of("weight", "mhc_norm.scale");
        w.norm += (size_t)index * (size_t)size;
    }
    return w;
}

/* The weights of the next layer of a stack. */
static struct weights next_layer(struct weights w, int layers, const struct config *c) {
    for (int kind = 0; kind < (c->columns ? 3 : 2); kind++) {
        int columns = kind < 2 ? c->n : c->columns;
        w.alpha[kind] += layers * c->n * c->C * columns;
        w.scale[kind] += layers;
        w.beta[kind] += layers * columns;
    }
    if (w.norm) w.norm += layers * c->n * c->C;
    return w;
}

/* A site around the suite's own sub-layer, which multiplies by scale [C]; reads are the gates of u. */
static void layer(const double *x, const double *carried, const double *scale, const struct weights *w, double *out,
                  double *handed, const struct config *c) {
    struct token t = new_token(c);
    double *y = zeros((size_t)c->C);
    coefficients(x, w, &t, c);
    pre_mix(c->previous ? carried : t.pre, x, y, c);
    for (int k = 0; k < c->C; k++) y[k] *= scale[k];
    post_mix(y, x, t.post, t.H, out, c);
    if (c->previous) memcpy(handed, t.pre, sizeof(double) * (size_t)c->n);
    free_token(&t);
    free(y);
}

static void layer_back(const double *of_out, const double *of_handed, const double *x, const double *carried,
                       const double *scale, const struct weights *w, double *of_x, double *of_carried,
                       struct weights *of_w, const struct config *c) {
    struct token t = new_token(c);
    double *y = zeros((size_t)c->C), *of_y = zeros((size_t)c->C);
    double of_reads[MOST_STREAMS] = {0}, of_post[MOST_STREAMS] = {0}, of_H[MOST_COLUMNS] = {0};
    coefficients(x, w, &t, c);
    const double *reads = c->previous ? carried : t.pre;
    pre_mix(reads, x, y, c);
    for (int k = 0; k < c->C; k++) y[k] *= scale[k];
    post_mix_back(of_out, y, x, t.post, t.H, of_y, of_x, of_post, of_H, c);
    for (int k = 0; k < c->C; k++) of_y[k] *= scale[k];
    pre_mix_back(of_y, reads, x, of_reads, of_x, c);
    coefficients_back(c->previous ? of_handed : of_reads, of_post, of_H, x, of_x, w, of_w, &t, c);
    for (int i = 0; i < c->n && c->previous; i++) of_carried[i] += of_reads[i];
    free_token(&t);
    free(y); free(of_y);
}

/* The factors of the sub-layer of the suite: norm_scale times branch_scale. */
static double *branch_scale(const struct config *c) {
    double *scale = zeros((size_t)c->C);
    for (int k = 0; k < c->C; k++) scale[k] = values_of("input", "norm_scale")[k] * values_of("input", "branch_scale")[k];
    return scale;
}

/* Makes one stream of n by sum, mean or the carried gates. */
static void reduce(const double *x, const double *carried, double *out, const char *line, const char *key, const struct config *c) {
    double gates[MOST_STREAMS] = {0};
    for (int i = 0; i < c->n; i++) gates[i] = is(line, key, "carried") ? carried[i] : is(line, key, "mean") ? 1.0 / c->n : 1;
    pre_mix(gates, x, out, c);
}

static void reduce_back(const double *of_out, const double *x, const double *carried, double *of_x, double *of_carried,
                        const char *line, const char *key, const struct config *c) {
    double gates[MOST_STREAMS] = {0}, of_gates[MOST_STREAMS] = {0};
    int by_carried = is(line, key, "carried");
    for (int i = 0; i < c->n; i++) gates[i] = by_carried ? carried[i] : is(line, key, "mean") ? 1.0 / c->n : 1;
    pre_mix_back(of_out, gates, x, of_gates, of_x, c);
    for (int i = 0; i < c->n && by_carried; i++) of_carried[i] += of_gates[i];
}

static void run_expand(const char *line, const struct config *c) {
    struct tensor *embedding = find("input", "embedding");
    char tail[64];
    (void)line;
    snprintf(tail, sizeof tail, ",%d,%d", c->n, c->C);
    size_t tokens = embedding->count / (size_t)c->C, size = (size_t)(c->n * c->C);
    double *out = make("output", "out", shape_like(embedding, tail), tokens * size, embedding->wide);
    double *g = values_of("cotangent", "out"), *gradient = g ? gradient_of("input", "embedding") : NULL;
    for (size_t t = 0; t < tokens; t++) {
        for (size_t k = 0; k < size; k++) out[t * size + k] = embedding->values[t * (size_t)c->C + k % (size_t)c->C];
        for (size_t k = 0; k < size && g; k++) gradient[t * (size_t)c->C + k % (size_t)c->C] += g[t * size + k];
    }
}

static void run_reduce(const char *line, const struct config *c) {
    struct tensor *x = find("input", "x");
    char tail[64];
    snprintf(tail, sizeof tail, ",%d", c->C);
    size_t size = (size_t)(c->n * c->C), tokens = x->count / size;
    double *out = make("output", "out", shape_like(x, tail), tokens * (size_t)c->C, x->wide);
    double *carried = values_of("input", "carried"), *g = values_of("cotangent", "out");
    double *of_x = g ? gradient_of("input", "x") : NULL, *of_carried = g && carried ? gradient_of("input", "carried") : NULL;
    for (size_t t = 0; t < tokens; t++) {
        double *gates = carried ? carried + t * (size_t)c->n : NULL, *to = of_carried ? of_carried + t * (size_t)c->n : NULL;
        reduce(x->values + t * size, gates, out + t * (size_t)c->C, line, "how", c);
        if (g) reduce_back(g + t * (size_t)c->C, x->values + t * size, gates, of_x + t * size, to, line, "how", c);
    }
}

static void run_head(const char *line, const struct config *c) {
    struct tensor *x = find("input", "x");
    char tail[64];
    (void)line;
    snprintf(tail, sizeof tail, ",%d", c->C);
    size_t size = (size_t)(c->n * c->C), tokens = x->count / size;
    double *out = make("output", "out", shape_like(x, tail), tokens * (size_t)c->C, x->wide), *g = values_of("cotangent", "out");
    struct weights w = {.alpha = {values_of("weight", "head_fn")}, .scale = {values_of("weight", "head_scale")},
                        .beta = {values_of("weight", "head_base")}}, of_w = {0};
    double *of_x = NULL, *of_normal = zeros(size);
    if (g) {
        of_x = gradient_of("input", "x");
        of_w.alpha[0] = gradient_of("weight", "head_fn");
        of_w.scale[0] = gradient_of("weight", "head_scale");
        of_w.beta[0] = gradient_of("weight", "head_base");
    }
    struct token t = new_token(c);
    for (size_t k = 0; k < tokens; k++) {
        const double *here = x->values + k * size;
        double gates[MOST_STREAMS], of_gates[MOST_STREAMS] = {0};
        normed(here, c->head_norm_eps, &t, c);
        project(t.normal, &w, 0, c->n, &t, (int)size);
        for (int i = 0; i < c->n; i++) gates[i] = sigmoid(t.z[0][i]) + c->pre_eps;
        pre_mix(gates, here, out + k * (size_t)c->C, c);
        if (!g) continue;
        pre_mix_back(g + k * (size_t)c->C, gates, here, of_gates, of_x + k * size, c);
        for (int i = 0; i < c->n; i++) of_gates[i] *= sigmoid(t.z[0][i]) * sigmoid(-t.z[0][i]);
        memset(of_normal, 0, sizeof(double) * size);
        project_back(of_gates, t.normal, of_normal, &w, &of_w, 0, c->n, &t, (int)size);
        normed_back(of_normal, here, of_x + k * size, &t, c);
    }
    free_token(&t);
    free(of_normal);
}

static void run_residual_matrix(const char *line, const struct config *c) {
    struct tensor *logits = find("input", "logits");
    char tail[64];
    (void)line;
    snprintf(tail, sizeof tail, ",%d,%d", c->n, c->n);
    size_t columns = (size_t)c->columns, size = (size_t)(c->n * c->n), tokens = logits->count / columns;
    double *H = make("output", "H", shape_like(logits, tail), tokens * size, logits->wide), *g = values_of("cotangent", "H");
    double *gradient = g ? gradient_of("input", "logits") : NULL;
    for (size_t t = 0; t < tokens; t++) {
        residual_matrix(logits->values + t * columns, g ? g + t * size : NULL, H + t * size,
                        gradient ? gradient + t * columns : NULL, c);
    }
}

/* The outputs pre, post and H, or a part of them. */
static void run_coefficients(const char *line, const struct config *c) {
    struct tensor *x = find("input", "x");
    char gates[64], matrix[64];
    (void)line;
    snprintf(gates, sizeof gates, ",%d", c->n);
    snprintf(matrix, sizeof matrix, ",%d,%d", c->n, c->n);
    size_t n = (size_t)c->n, size = n * (size_t)c->C, tokens = x->count / size;
    double *pre = make("output", "pre", shape_like(x, gates), tokens * n, x->wide);
    double *post = make("output", "post", shape_like(x, gates), tokens * n, x->wide);
    double *H = make("output", "H", shape_like(x, matrix), tokens * n * n, x->wide);
    double *of_pre = values_of("cotangent", "pre"), *of_post = values_of("cotangent", "post"), *of_H = values_of("cotangent", "H");
    double *of_x = of_pre ? gradient_of("input", "x") : NULL;
    struct weights w = layer_weights(0, 0, c), of_w = {0};
    if (of_pre) of_w = layer_weights(1, 0, c);
    struct token t = new_token(c);
    for (size_t k = 0; k < tokens; k++) {
        const double *here = x->values + k * size;
        coefficients(here, &w, &t, c);
        memcpy(pre + k * n, t.pre, sizeof(double) * n);
        memcpy(post + k * n, t.post, sizeof(double) * n);
        memcpy(H + k * n * n, t.H, sizeof(double) * n * n);
        if (of_pre) coefficients_back(of_pre + k * n, of_post + k * n, of_H + k * n * n, here, of_x + k * size, &w, &of_w, &t, c);
    }
    free_token(&t);
}

static void run_pre(const char *line, const struct config *c) {
    struct tensor *x = find("input", "x");
    char width[64], gates[64];
    (void)line;
    snprintf(width, sizeof width, ",%d", c->C);
    snprintf(gates, sizeof gates, ",%d", c->n);
    size_t n = (size_t)c->n, C = (size_t)c->C, size = n * C, tokens = x->count / size;
    double *u = make("output", "u", shape_like(x, width), tokens * C, x->wide), *carried = values_of("input", "carried");
    double *pre = c->previous ? make("output", "pre", shape_like(x, gates), tokens * n, x->wide) : NULL;
    double *of_u = values_of("cotangent", "u"), *of_handed = values_of("cotangent", "pre");
    double *of_x = of_u ? gradient_of("input", "x") : NULL, *of_carried = of_u ? gradient_of("input", "carried") : NULL;
    struct weights w = layer_weights(0, 0, c), of_w = {0};
    if (of_u) of_w = layer_weights(1, 0, c);
    struct token t = new_token(c);
    for (size_t k = 0; k < tokens; k++) {
        const double *here = x->values + k * size;
        double of_reads[MOST_STREAMS] = {0};
        coefficients(here, &w, &t, c);
        const double *reads = c->previous ? carried + k * n : t.pre;
        pre_mix(reads, here, u + k * C, c);
        if (pre) memcpy(pre + k * n, t.pre, sizeof(double) * n);
        if (!of_u) continue;
        pre_mix_back(of_u + k * C, reads, here, of_reads, of_x + k * size, c);
        coefficients_back(c->previous ? of_handed + k * n : of_reads, NULL, NULL, here, of_x + k * size, &w, &of_w, &t, c);
        for (size_t i = 0; i < n && c->previous; i++) of_carried[k * n + i] += of_reads[i];
    }
    free_token(&t);
}

static void run_post(const char *line, const struct config *c) {
    struct tensor *x = find("input", "x");
    (void)line;
    size_t n = (size_t)c->n, C = (size_t)c->C, size = n * C, tokens = x->count / size;
    double *y = values_of("input", "y"), *post = values_of("input", "post"), *H = values_of("input", "H");
    double *out = make("output", "out", x->shape, x->count, x->wide), *g = values_of("cotangent", "out");
    double *of_y = g ? gradient_of("input", "y") : NULL, *of_x = g ? gradient_of("input", "x") : NULL;
    double *of_post = g ? gradient_of("input", "post") : NULL, *of_H = g ? gradient_of("input", "H") : NULL;
    for (size_t k = 0; k < tokens; k++) {
        const double *here = x->values + k * size;
        post_mix(y + k * C, here, post + k * n, H + k * n * n, out + k * size, c);
        if (g) post_mix_back(g + k * size, y + k * C, here, post + k * n, H + k * n * n, of_y + k * C, of_x + k * size,
                             of_post + k * n, of_H + k * n * n, c);
    }
}

static void run_layer(const char *line, const struct config *c) {
    static const char *const ROUTED[] = {"load_balance_loss", "moe_bias_updates"};
    struct tensor *x = find("input", "x");
    char gates[64];
    (void)line;
    snprintf(gates, sizeof gates, ",%d", c->n);
    size_t n = (size_t)c->n, size = n * (size_t)c->C, tokens = x->count / size;
    double *out = make("output", "out", x->shape, x->count, x->wide), *carried = values_of("input", "carried");
    double *pre = c->previous ? make("output", "pre", shape_like(x, gates), tokens * n, x->wide) : NULL;
    double *g = values_of("cotangent", "out"), *of_handed = values_of("cotangent", "pre"), *scale = branch_scale(c);
    double *of_x = g ? gradient_of("input", "x") : NULL, *of_carried = g ? gradient_of("input", "carried") : NULL;
    struct weights w = layer_weights(0, 0, c), of_w = {0};
    if (g) of_w = layer_weights(1, 0, c);
    for (size_t k = 0; k < tokens; k++) {
        const double *here = x->values + k * size, *reads = c->previous ? carried + k * n : NULL;
        layer(here, reads, scale, &w, out + k * size, pre ? pre + k * n : NULL, c);
        if (g) layer_back(g + k * size, of_handed ? of_handed + k * n : NULL, here, reads, scale, &w, of_x + k * size,
                          of_carried ? of_carried + k * n : NULL, &of_w, c);
    }
    for (int k = 0; k < 2; k++) { /* the two values of a router go through the layer */
        struct tensor *value = find("input", ROUTED[k]), *back = find("cotangent", ROUTED[k]);
        if (!value) continue;
        memcpy(make("output", ROUTED[k], value->shape, value->count, value->wide), value->values, 8 * value->count);
        if (back) memcpy(gradient_of("input", ROUTED[k]), back->values, 8 * value->count);
    }
    free(scale);
}

static void run_stack(const char *line, const struct config *c) {
    struct tensor *embedding = find("input", "embedding");
    int layers = (int)number_of(line, "layers", 0), kept = is(line, "reduce", "none");
    size_t n = (size_t)c->n, C = (size_t)c->C, size = n * C, tokens = embedding->count / C, deep = (size_t)layers;
    char tail[64];
    if (kept) snprintf(tail, sizeof tail, ",%d,%d", c->n, c->C);
    else snprintf(tail, sizeof tail, ",%d", c->C);
    double *out = make("output", "out", shape_like(embedding, tail), tokens * (kept ? size : C), embedding->wide);
    double *g = values_of("cotangent", "out"), *gradient = g ? gradient_of("input", "embedding") : NULL;
    double *scale = branch_scale(c), *x = zeros((deep + 1) * size), *carried = zeros((deep + 1) * n);
    double *of_x = zeros(size), *of_carried = zeros(n), *of_before = zeros(size), *of_carried_before = zeros(n);
    struct weights w = layer_weights(0, 0, c), of_w = {0};
    if (g) of_w = layer_weights(1, 0, c);
    for (size_t t = 0; t < tokens; t++) {
        for (size_t k = 0; k < size; k++) x[k] = embedding->values[t * C + k % C];
        for (size_t i = 0; i < n; i++) carried[i] = i == 0; /* the first single-pass site reads stream 0 */
        for (size_t at_layer = 0; at_layer < deep; at_layer++) {
            struct weights here = next_layer(w, (int)at_layer, c);
            layer(x + at_layer * size, carried + at_layer * n, scale, &here, x + (at_layer + 1) * size,
                  carried + (at_layer + 1) * n, c);
        }
        if (kept) memcpy(out + t * size, x + deep * size, sizeof(double) * size);
        else reduce(x + deep * size, carried + deep * n, out + t * C, line, "reduce", c);
        if (!g) continue;
        memset(of_x, 0, sizeof(double) * size);
        memset(of_carried, 0, sizeof(double) * n);
        if (kept) memcpy(of_x, g + t * size, sizeof(double) * size);
        else reduce_back(g + t * C, x + deep * size, carried + deep * n, of_x, of_carried, line, "reduce", c);
        for (size_t at_layer = deep; at_layer-- > 0;) {
            struct weights here = next_layer(w, (int)at_layer, c), of_here = next_layer(of_w, (int)at_layer, c);
            memset(of_before, 0, sizeof(double) * size);
            memset(of_carried_before, 0, sizeof(double) * n);
            layer_back(of_x, of_carried, x + at_layer * size, carried + at_layer * n, scale, &here, of_before,
                       of_carried_before, &of_here, c);
            memcpy(of_x, of_before, sizeof(double) * size);
            memcpy(of_carried, of_carried_before, sizeof(double) * n);
        }
        for (size_t k = 0; k < size; k++) gradient[t * C + k % C] += of_x[k];
    }
    free(scale); free(x); free(carried); free(of_x); free(of_carried); free(of_before); free(of_carried_before);
}

static const struct { const char *name; void (*run)(const char *line, const struct config *c); } STAGES[] = {
    {"expand", run_expand},
    {"reduce", run_reduce},
    {"head", run_head},
    {"residual_matrix", run_residual_matrix},
    {"coefficients", run_coefficients},
    {"pre", run_pre},
    {"post", run_post},
    {"layer", run_layer},
    {"stack", run_stack},
};

static void answer(const char *line) {
    char *id = text_of(line, "id"), *input = text_of(line, "input"), *output = text_of(line, "output");
    struct config c = configuration(line);
    if (c.n > MOST_STREAMS || c.columns > MOST_COLUMNS) {
        printf("{\"id\": \"%s\", \"status\": \"refused\", \"reason\": \"at most %d streams\"}\n", id, MOST_STREAMS);
    } else {
        read_tensors(input);
        for (size_t k = 0; k < sizeof STAGES / sizeof *STAGES; k++) {
            if (is(line, "stage", STAGES[k].name)) STAGES[k].run(line, &c);
        }
        write_results(output, id);
        printf("{\"id\": \"%s\", \"status\": \"done\"}\n", id);
    }
    free(id); free(input); free(output);
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
