/* Judges an attention kernel written in C against golden files. Build: cc -O2 check.c -lm; run: ./a.out FILE... */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static char *file;      /* 8 bytes: length n of the header; n bytes of JSON; the numbers, little endian */
static long long size;  /* elements of the tensor that was found last */

/* The reader: the numbers of a tensor, or NULL. */
static void *tensor(const char *name) {
    uint64_t n, first, last;
    char key[64], shape[] = "\"shape\":[", offsets[] = "\"data_offsets\":[";
    memcpy(&n, file, 8);
    snprintf(key, sizeof key, "\"%s\":{\"dtype\":", name);
    char *at = strstr(file + 8, key);
    if (!at) return NULL;
    char *p = strstr(at, shape) + strlen(shape);
    for (size = 1; *p != ']'; p += *p == ',') size *= strtoll(p, &p, 10);
    p = strstr(at, offsets) + strlen(offsets);
    first = strtoull(p, &p, 10), last = strtoull(p + 1, &p, 10);
    return last > first ? file + 8 + n + first : NULL;
}

static void load(const char *path) {
    FILE *f = fopen(path, "rb");
    if (!f || fseek(f, 0, SEEK_END)) exit((perror(path), 2));
    long n = ftell(f);
    file = realloc(file, n + 1), rewind(f);
    if (fread(file, 1, n, f) != (size_t)n) exit((perror(path), 2));
    file[n] = 0, fclose(f);
}

/* The judge: the largest error ÷ bound; where the truth is infinite or NaN, so must the answer be. */
static double worst(const char *name, const char *bound, const float *got) {
    double ratio = 0, *truth = tensor(name), *allowed = tensor(bound);
    for (long long i = 0; i < size; i++) {
        double error = fabs(got[i] - truth[i]), now = error <= allowed[i] ? 0 : INFINITY;
        if (!isfinite(truth[i])) now = isnan(truth[i]) ? (isnan(got[i]) ? 0 : INFINITY) : got[i] == truth[i] ? 0 : INFINITY;
        else if (allowed[i] > 0) now = isnan(error) ? INFINITY : error / allowed[i];
        if (now > ratio) ratio = now;
    }
    return ratio;
}

/* Your kernel stands here: one head, float32, two passes. Pairs that are not seen are never read. */
static void attend(int T, int S, int D, int E, const float *q, const float *k, const float *v, const uint8_t *seen,
                   const double *bias, const double *sink, float scale, float cap, float *o, float *lse) {
    float *w = malloc(S * sizeof *w + 1);
    for (int i = 0; i < T; i++) {
        float top = sink ? (float)*sink : -INFINITY, z = 0;
        for (int j = 0; j < S; j++) {
            if (!seen[i * S + j]) continue;
            float s = 0;
            for (int d = 0; d < D; d++) s += q[i * D + d] * k[j * D + d];
            s *= scale;
            if (cap > 0) s = cap * tanhf(s / cap);
            w[j] = s + (bias ? (float)bias[i * S + j] : 0);
            if (w[j] > top) top = w[j];
        }
        for (int e = 0; e < E; e++) o[i * E + e] = 0;
        for (int j = 0; j < S; j++) {
            if (!seen[i * S + j]) continue;
            float p = expf(w[j] - top);
            z += p;
            for (int e = 0; e < E; e++) o[i * E + e] += p * v[j * E + e];
        }
        if (sink) z += expf((float)*sink - top);
        for (int e = 0; e < E && z != 0; e++) o[i * E + e] /= z;
        lse[i] = z != 0 ? top + logf(z) : -INFINITY;
    }
    free(w);
}

int main(int count, char **paths) {
    int failed = 0;
    for (int n = 1; n < count; n++) {
        load(paths[n]);
        int64_t *sizes = tensor("sizes");  /* problems, T, S, D, E: leading axes are one, and every problem has its own */
        int N = sizes[0], T = sizes[1], S = sizes[2], D = sizes[3], E = sizes[4];
        float *q = tensor("q"), *k = tensor("k"), *v = tensor("v"), *o = calloc(N * T * E + 1, 4), *lse = calloc(N * T + 1, 4);
        double *bias = tensor("bias"), *sink = tensor("sink"), *scale = tensor("scale"), *cap = tensor("softcap");
        uint8_t *seen = tensor("seen");
        for (int h = 0; h < N; h++)
            attend(T, S, D, E, q + h * T * D, k + h * S * D, v + h * S * E, seen + h * T * S, bias ? bias + h * T * S : NULL,
                   sink ? sink + h : NULL, *scale, cap ? *cap : 0, o + h * T * E, lse + h * T);
        double a = worst("o", "o_bound", o), b = worst("lse", "lse_bound", lse);
        printf("%s: o %.3f, lse %.3f of the bound%s\n", paths[n], a, b, a <= 1 && b <= 1 ? "" : " -- WRONG");
        failed += !(a <= 1 && b <= 1);
        free(o), free(lse);
    }
    printf("%d of %d wrong\n", failed, count - 1);
    return failed > 0;
}
