/* Attention of a packed row over trees of segments, forward and backward, in fp32 on a CPU.
 *
 * A task is one query head of one tree: nothing is shared between tasks, so results do not depend
 * on the number of threads. Queries come in tiles of M, keys and values in tiles of N; a tile's
 * scores stay in the first cache. Source: Dao et al., 2022 (arXiv 2205.14135).
 *
 * Shapes: T tokens, H query heads, K key/value heads, d head size, R trees, B blocks.
 */
#include <stdlib.h>
#include <string.h>

#include "exponential.h"

#define M 64
#define N 64
#ifdef __AVX512F__
#define L 16 /* floats of a vector */
#define NV 4 /* vectors of a register tile */
#else
#define L 8
#define NV 2
#endif
#define WIDE (NV * L)

typedef float vec __attribute__((vector_size(4 * L), aligned(4)));

/* rows x (NV * L) of c (+)= a times b over k; a[i, k] at i * ai + k * ak */
#define KERNEL(R)                                                                              \
    static inline __attribute__((always_inline)) void kernel##R(                               \
        const float *a, long ai, long ak, const float *b, long bs, float *c, long cs, long K,  \
        int add) {                                                                             \
        vec acc[R][NV];                                                                        \
        for (int i = 0; i < R; i++)                                                            \
            for (int v = 0; v < NV; v++)                                                       \
                acc[i][v] = add ? *(const vec *)(c + i * cs + v * L) : (vec){0};               \
        for (long k = 0; k < K; k++)                                                           \
            for (int i = 0; i < R; i++)                                                        \
                for (int v = 0; v < NV; v++)                                                   \
                    acc[i][v] += a[i * ai + k * ak] * *(const vec *)(b + k * bs + v * L);      \
        for (int i = 0; i < R; i++)                                                            \
            for (int v = 0; v < NV; v++) *(vec *)(c + i * cs + v * L) = acc[i][v];             \
    }
KERNEL(1)
KERNEL(2)
KERNEL(4)
KERNEL(6)

/* c [m, n] (+)= a [m, K] b [K, n]; n a multiple of WIDE */
static void multiply(const float *a, long ai, long ak, const float *b, long bs, float *c, long cs,
                     long m, long n, long K, int add) {
    for (long j = 0; j < n; j += WIDE) {
        long i = 0;
#define ROWS(R) \
    for (; i + R <= m; i += R) kernel##R(a + i * ai, ai, ak, b + j, bs, c + i * cs + j, cs, K, add);
        ROWS(6) ROWS(4) ROWS(2) ROWS(1)
#undef ROWS
    }
}

/* out [d, N] = x [n, d] transposed, zeros beyond n */
static void transpose(const float *x, long stride, long n, long d, float *out) {
    for (long j0 = 0; j0 < N; j0 += 16)
        for (long i0 = 0; i0 < d; i0 += 16)
            for (long i = i0; i < i0 + 16; i++)
                for (long j = j0; j < j0 + 16; j++) out[i * N + j] = j < n ? x[j * stride + i] : 0;
}

/* out [T, H, d] and log-sum-exps [H, T].
 *
 * blocks [B, 4]: queries [q0, q1) look at keys [k0, k1), causally where they are the same. They
 * come tree by tree; trees [R + 1] are their bounds, rows [R + 1] those of the tokens. q [T, H, d]
 * and k, v [T, K, d] may be parts of wider rows. d is a multiple of 64. */
void tree_forward(const float *q, long qs, const float *k, long ks, const float *v, long vs,
                  const int64_t *blocks, const int64_t *trees, const int64_t *rows, float *out,
                  float *lse, long R, long T, long H, long Kh, long d) {
    float scale = 1.0f / sqrtf((float)d);
#pragma omp parallel
    {
        float *kt = aligned_alloc(64, sizeof(float) * (d * N + M * N));
        float *s = kt + d * N;
#pragma omp for schedule(dynamic) collapse(2)
        for (long r = 0; r < R; r++)
            for (long h = 0; h < H; h++) {
                const float *kh = k + h / (H / Kh) * d, *vh = v + h / (H / Kh) * d;
                float *sum = lse + h * T;
                float *big = malloc(sizeof(float) * (rows[r + 1] - rows[r]));
                for (long t = rows[r]; t < rows[r + 1]; t++) {
                    sum[t] = 0, big[t - rows[r]] = -INFINITY;
                    memset(out + (t * H + h) * d, 0, sizeof(float) * d);
                }
                for (long b = trees[r]; b < trees[r + 1]; b++) {
                    const int64_t *at = blocks + 4 * b;
                    int causal = at[0] == at[2];
                    for (long j = at[2]; j < at[3]; j += N) {
                        long n = at[3] - j < N ? at[3] - j : N;
                        long wide = (n + WIDE - 1) / WIDE * WIDE;
                        transpose(kh + j * ks, ks, n, d, kt);
                        /* causal: queries before key j see none of the tile. Both start at the
                         * same token and M = N, so only the tile with i == j needs a mask */
                        for (long i = causal ? j : at[0]; i < at[1]; i += M) {
                            long m = at[1] - i < M ? at[1] - i : M;
                            multiply(q + i * qs + h * d, qs, 1, kt, N, s, N, m, wide, d, 0);
                            for (long x = 0; x < m; x++) {
                                float *row = s + x * N, most = big[i + x - rows[r]], total = 0;
                                long seen = causal && i == j ? x + 1 : n;
                                float old = most;
#pragma omp simd reduction(max : most)
                                for (long y = 0; y < seen; y++) {
                                    row[y] *= scale;
                                    most = row[y] > most ? row[y] : most;
                                }
#pragma omp simd reduction(+ : total)
                                for (long y = 0; y < seen; y++) {
                                    row[y] = exponential(row[y] - most);
                                    total += row[y];
                                }
                                for (long y = seen; y < n; y++) row[y] = 0;
                                /* online softmax: sums and outputs so far are relative to the
                                 * old maximum */
                                float keep = old == -INFINITY ? 0 : exponential(old - most);
                                sum[i + x] = sum[i + x] * keep + total;
                                big[i + x - rows[r]] = most;
                                if (keep != 1.0f) {
                                    float *o = out + ((i + x) * H + h) * d;
                                    for (long y = 0; y < d; y++) o[y] *= keep;
                                }
                            }
                            multiply(s, N, 1, vh + j * vs, vs, out + (i * H + h) * d, H * d, m, d, n, 1);
                        }
                    }
                }
                for (long t = rows[r]; t < rows[r + 1]; t++) {
                    float *o = out + (t * H + h) * d, inverse = 1.0f / sum[t];
                    for (long y = 0; y < d; y++) o[y] *= inverse;
                    sum[t] = logf(sum[t]) + big[t - rows[r]];
                }
                free(big);
            }
        free(kt);
    }
}

/* dq, dk, dv [T, H, d]; dk and dv of each query head apart, for the caller to add up: query heads
 * that share a key head are tasks of different threads, whose order of additions would vary.
 *
 * The probabilities P = exp(S - lse) are computed again from the scores S. With dP = dO V^T the
 * gradient of the scores is P (dP - inner), where inner = sum(dO O) of the query. */
void tree_backward(const float *q, long qs, const float *k, long ks, const float *v, long vs,
                   const int64_t *blocks, const int64_t *trees, const int64_t *rows,
                   const float *out, const float *lse, const float *dout, float *dq, float *dk,
                   float *dv, long R, long T, long H, long Kh, long d) {
    float scale = 1.0f / sqrtf((float)d);
#pragma omp parallel
    {
        float *kt = aligned_alloc(64, sizeof(float) * (2 * d * N + 2 * M * N));
        float *vt = kt + d * N, *s = vt + d * N, *dp = s + M * N;
#pragma omp for schedule(dynamic) collapse(2)
        for (long r = 0; r < R; r++)
            for (long h = 0; h < H; h++) {
                const float *kh = k + h / (H / Kh) * d, *vh = v + h / (H / Kh) * d;
                float *inner = malloc(sizeof(float) * (rows[r + 1] - rows[r]));
                for (long t = rows[r]; t < rows[r + 1]; t++) {
                    const float *o = out + (t * H + h) * d, *g = dout + (t * H + h) * d;
                    float total = 0;
#pragma omp simd reduction(+ : total)
                    for (long y = 0; y < d; y++) total += o[y] * g[y];
                    inner[t - rows[r]] = total;
                    memset(dq + (t * H + h) * d, 0, sizeof(float) * d);
                    memset(dk + (t * H + h) * d, 0, sizeof(float) * d);
                    memset(dv + (t * H + h) * d, 0, sizeof(float) * d);
                }
                for (long b = trees[r]; b < trees[r + 1]; b++) {
                    const int64_t *at = blocks + 4 * b;
                    int causal = at[0] == at[2];
                    for (long j = at[2]; j < at[3]; j += N) {
                        long n = at[3] - j < N ? at[3] - j : N;
                        long wide = (n + WIDE - 1) / WIDE * WIDE;
                        transpose(kh + j * ks, ks, n, d, kt);
                        transpose(vh + j * vs, vs, n, d, vt);
                        for (long i = causal ? j : at[0]; i < at[1]; i += M) {
                            long m = at[1] - i < M ? at[1] - i : M;
                            const float *qi = q + i * qs + h * d, *gi = dout + (i * H + h) * d;
                            multiply(qi, qs, 1, kt, N, s, N, m, wide, d, 0);
                            multiply(gi, H * d, 1, vt, N, dp, N, m, wide, d, 0);
                            for (long x = 0; x < m; x++) {
                                float *row = s + x * N, *grow = dp + x * N;
                                float base = lse[h * T + i + x], in = inner[i + x - rows[r]];
                                long seen = causal && i == j ? x + 1 : n;
#pragma omp simd
                                for (long y = 0; y < seen; y++) {
                                    row[y] = exponential(row[y] * scale - base);
                                    grow[y] = row[y] * (grow[y] - in) * scale;
                                }
                                for (long y = seen; y < n; y++) row[y] = grow[y] = 0;
                            }
                            multiply(s, 1, N, gi, H * d, dv + (j * H + h) * d, H * d, n, d, m, 1);
                            multiply(dp, 1, N, qi, qs, dk + (j * H + h) * d, H * d, n, d, m, 1);
                            multiply(dp, N, 1, kh + j * ks, ks, dq + (i * H + h) * d, H * d, m, d, n, 1);
                        }
                    }
                }
                free(inner);
            }
        free(kt);
    }
}
