/* The decoder's matrix products and the operations between them, in fp32 on a CPU.
 *
 * Decoding multiplies a few rows with every weight of the model: it runs at the speed of memory
 * when the next weights are prefetched while these are multiplied. The operations between the
 * products take PyTorch five to twenty small kernels each, whose overhead costs more than the work.
 * Every row is computed by one thread in one order, so its bits depend neither on the number of
 * threads nor on the rows beside it.
 *
 * Shapes: T tokens, B rows, D inputs, O outputs, F intermediate, H query heads, K key/value heads,
 * d head size, G = H / K.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "exponential.h"

#define PARALLEL_FROM 16384 /* elements: below, waking the other threads costs more */

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif

typedef float vector __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t mask __attribute__((vector_size(4 * LANES)));

static inline long least(long a, long b) { return a < b ? a : b; }

/* the elements of a and, from LANES on, of b that `which` numbers */
static inline vector pick(vector a, vector b, mask which) {
#ifdef __clang__
    vector found;
    for (int n = 0; n < LANES; n++) found[n] = which[n] < LANES ? a[which[n]] : b[which[n] - LANES];
    return found;
#else
    return __builtin_shuffle(a, b, which);
#endif
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

static inline float inverse_rms(const float *x, float eps, long D) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < D; i++) sum += x[i] * x[i];
    return 1.0f / sqrtf(sum / (float)D + eps);
}

static inline void norm_row(const float *x, const float *weight, float eps, float *y, long D) {
    float scale = inverse_rms(x, eps, D);
#pragma omp simd
    for (long i = 0; i < D; i++) y[i] = x[i] * scale * weight[i];
}

/* y [T, D] = x / rms(x) * weight */
void rms_norm(const float *x, const float *weight, float eps, float *y, long T, long D) {
#pragma omp parallel for schedule(static) if (T * D >= PARALLEL_FROM)
    for (long t = 0; t < T; t++) norm_row(x + t * D, weight, eps, y + t * D, D);
}

/* dx [T, D] */
void rms_norm_backward(const float *x, const float *weight, float eps, const float *dy, float *dx,
                       long T, long D) {
#pragma omp parallel for schedule(static) if (T * D >= PARALLEL_FROM)
    for (long t = 0; t < T; t++) {
        const float *in = x + t * D, *grad = dy + t * D;
        float *out = dx + t * D;
        float scale = inverse_rms(in, eps, D), inner = 0;
#pragma omp simd reduction(+ : inner)
        for (long i = 0; i < D; i++) inner += grad[i] * weight[i] * in[i];
        float pull = inner * scale * scale / (float)D;
#pragma omp simd
        for (long i = 0; i < D; i++) out[i] = (grad[i] * weight[i] - in[i] * pull) * scale;
    }
}

static inline void gated(const float *gate, const float *up, float *y, long n) {
#pragma omp simd
    for (long i = 0; i < n; i++) y[i] = gate[i] * sigmoid(gate[i]) * up[i];
}

/* y [T, F] = silu(gate) * up of x [T, 2F] */
void swiglu(const float *x, float *y, long T, long F) {
#pragma omp parallel for schedule(static) if (T * F >= PARALLEL_FROM)
    for (long t = 0; t < T; t++) gated(x + 2 * t * F, x + (2 * t + 1) * F, y + t * F, F);
}

/* dx [T, 2F] */
void swiglu_backward(const float *x, const float *dy, float *dx, long T, long F) {
#pragma omp parallel for schedule(static) if (T * F >= PARALLEL_FROM)
    for (long t = 0; t < T; t++) {
        const float *gate = x + 2 * t * F, *up = gate + F, *grad = dy + t * F;
        float *d_gate = dx + 2 * t * F, *d_up = d_gate + F;
#pragma omp simd
        for (long i = 0; i < F; i++) {
            float s = sigmoid(gate[i]), silu = gate[i] * s;
            d_gate[i] = grad[i] * up[i] * (s + silu * (1.0f - s));
            d_up[i] = grad[i] * silu;
        }
    }
}

/* Of softmax(logits [T, V] * scales [T]): the log-probability [T] of each target and the entropy
 * [T]. The logits become the gradient of the log-probability with respect to them. */
void target_logprobs(float *logits, const int64_t *targets, const float *scales, float *logprobs,
                     float *entropy, long T, long V) {
#pragma omp parallel for schedule(static) if (T * V >= PARALLEL_FROM)
    for (long t = 0; t < T; t++) {
        float *x = logits + t * V, scale = scales[t], largest = -INFINITY, sum = 0, inner = 0;
#pragma omp simd reduction(max : largest)
        for (long i = 0; i < V; i++) largest = x[i] > largest ? x[i] : largest;
        float picked = (x[targets[t]] - largest) * scale;
#pragma omp simd reduction(+ : sum, inner)
        for (long i = 0; i < V; i++) {
            float shifted = (x[i] - largest) * scale, e = exponential(shifted);
            sum += e;
            inner += e * shifted;
            x[i] = e;
        }
        float log_sum = logf(sum), pull = -scale / sum;
        logprobs[t] = picked - log_sum;
        entropy[t] = log_sum - inner / sum;
#pragma omp simd
        for (long i = 0; i < V; i++) x[i] *= pull;
        x[targets[t]] += scale;
    }
}

/* y [d] = x rotated by angles [d / 2]; may be the same */
static inline void rotate_head(const float *x, const float *cosines, const float *sines,
                               float direction, float *y, long d) {
    long half = d / 2;
#pragma omp simd
    for (long i = 0; i < half; i++) {
        float first = x[i], second = x[i + half], sine = direction * sines[i];
        y[i] = first * cosines[i] - second * sine;
        y[i + half] = second * cosines[i] + first * sine;
    }
}

/* y [T, H, d] = x rotated by angles [T, d / 2]; direction -1 rotates back. x and y may be parts
 * of wider rows, and the same. */
void rotate(const float *x, long x_stride, const float *cosines, const float *sines,
            float direction, float *y, long y_stride, long T, long H, long d) {
    long half = d / 2;
#pragma omp parallel for schedule(static) if (T * H * d >= PARALLEL_FROM)
    for (long t = 0; t < T; t++)
        for (long h = 0; h < H; h++)
            rotate_head(x + t * x_stride + h * d, cosines + t * half, sines + t * half, direction,
                        y + t * y_stride + h * d, d);
}

/* the sum of each of LANES vectors */
static inline vector sums_of(vector *v) {
    mask even, odd;
    for (int n = 0; n < LANES; n++) odd[n] = (even[n] = 2 * n) + 1;
#pragma GCC unroll 4
    for (int count = LANES / 2; count > 0; count /= 2)
#pragma GCC unroll 8
        for (int n = 0; n < count; n++)
            v[n] = pick(v[2 * n], v[2 * n + 1], even) + pick(v[2 * n], v[2 * n + 1], odd);
    return v[0];
}

/* the dot products of q [d] with `n` <= LANES keys [n, d]; further lanes repeat the last key, so
 * that no load is beyond the keys */
static inline __attribute__((always_inline)) vector dots(const float *q, const float *keys, long n,
                                                         long d) {
    vector sums[LANES];
#pragma GCC unroll 16
    for (int r = 0; r < LANES; r++) {
        const float *key = keys + least(r, n - 1) * d;
        vector sum = {0};
        long i = 0;
        for (; i + LANES <= d; i += LANES)
            sum += *(const vector *)(q + i) * *(const vector *)(key + i);
        for (; i < d; i++) sum[0] += q[i] * key[i];
        sums[r] = sum;
    }
    return sums_of(sums);
}

/* scores [G, N] at n columns = scale * queries [G, d] times keys [n, d] */
static inline __attribute__((always_inline)) void score(const float *restrict q,
                                                        const float *restrict keys, long n, long G,
                                                        long d, float scale, long N,
                                                        float *restrict scores) {
    long j = 0;
    for (; j + LANES <= n; j += LANES)
        for (long g = 0; g < G; g++)
            *(vector *)(scores + g * N + j) = scale * dots(q + g * d, keys + j * d, LANES, d);
    for (long g = 0; g < G && j < n; g++) {
        vector found = scale * dots(q + g * d, keys + j * d, n - j, d);
        memcpy(scores + g * N + j, &found, (n - j) * sizeof(float));
    }
}

#define LINE 16               /* floats of a cache line */
#define TILE 64               /* floats of a sum that stay in registers */
#define VECTORS (TILE / LANES)
#define CHAINS (8 / VECTORS) /* of additions, to keep both units busy */

/* out [d] += weights [n] times values [n, d] */
static inline __attribute__((always_inline)) void mix(const float *restrict weights,
                                                      const float *restrict values, long n, long d,
                                                      float *restrict out) {
    long start = 0;
    for (; start + TILE <= d; start += TILE) {
        vector sum[CHAINS][VECTORS] = {0};
        long j = 0;
        for (; j + CHAINS <= n; j += CHAINS)
#pragma GCC unroll 2
            for (int c = 0; c < CHAINS; c++) {
                const vector *value = (const vector *)(values + (j + c) * d + start);
#pragma GCC unroll 8
                for (int v = 0; v < VECTORS; v++) sum[c][v] += weights[j + c] * value[v];
            }
        for (; j < n; j++) {
            const vector *value = (const vector *)(values + j * d + start);
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) sum[0][v] += weights[j] * value[v];
        }
        for (int c = 1; c < CHAINS; c++)
            for (int v = 0; v < VECTORS; v++) sum[0][v] += sum[c][v];
        for (int v = 0; v < VECTORS; v++) *((vector *)(out + start) + v) += sum[0][v];
    }
    for (long j = 0; j < n; j++)
        for (long i = start; i < d; i++) out[i] += weights[j] * values[j * d + i];
}

static inline __attribute__((always_inline)) void attend(const float *q, const float *prompt_keys,
                                                         const float *prompt_values, long P,
                                                         const float *keys, const float *values,
                                                         long n, long G, long d, float *scores,
                                                         float *out) {
    long N = P + n;
    float scale = 1.0f / sqrtf((float)d);
    score(q, prompt_keys, P, G, d, scale, N, scores);
    score(q, keys, n, G, d, scale, N, scores + P);
    for (long g = 0; g < G; g++) {
        float *weights = scores + g * N, *mixed = out + g * d, largest = -INFINITY, total = 0;
#pragma omp simd reduction(max : largest)
        for (long j = 0; j < N; j++) largest = weights[j] > largest ? weights[j] : largest;
#pragma omp simd reduction(+ : total)
        for (long j = 0; j < N; j++) {
            weights[j] = exponential(weights[j] - largest);
            total += weights[j];
        }
        memset(mixed, 0, d * sizeof(float));
        mix(weights, prompt_values, P, d, mixed);
        mix(weights + P, values, n, d, mixed);
#pragma omp simd
        for (long i = 0; i < d; i++) mixed[i] /= total;
    }
}

/* The rows of a step and where their keys and values lie. */
typedef struct {
    float *keys, *values;   /* [S, K, C, d]: the cache of one layer */
    const int64_t *slots;   /* [B]: where a row is cached */
    const int64_t *lengths; /* [B]: how many tokens it had */
    const int64_t *prompts; /* [B, 3]: the addresses of its prompt's keys and values [K, P, d] of
                               this layer, and P */
    float *scores;          /* [B, K, each], each at least G * (longest P + length + 2) */
    long each, K, G, C, d;
} cached;

/* Writes a row's token into its cache, then attends over the prompt and the row's tokens: key head
 * h of row b. out [G, d] */
static void attend_head(const cached *c, long b, long h, const float *q, const float *k,
                        const float *v, float *out) {
    long d = c->d, P = c->prompts[3 * b + 2], n = c->lengths[b];
    const float *prompt_keys = (const float *)(intptr_t)c->prompts[3 * b] + h * P * d;
    const float *prompt_values = (const float *)(intptr_t)c->prompts[3 * b + 1] + h * P * d;
    float *keys = c->keys + (c->slots[b] * c->K + h) * c->C * d;
    float *values = c->values + (c->slots[b] * c->K + h) * c->C * d;
    float *scores = c->scores + (b * c->K + h) * c->each;
    /* prefetched while the prompt's keys and values are read */
    for (long i = 0; i < n * d; i += LINE) __builtin_prefetch(keys + i, 0, 2);
    for (long i = 0; i < n * d; i += LINE) __builtin_prefetch(values + i, 0, 2);
    memcpy(keys + n * d, k, d * sizeof(float));
    memcpy(values + n * d, v, d * sizeof(float));
    if (d == 64) /* a length known here makes the inner loops straight vector code */
        attend(q, prompt_keys, prompt_values, P, keys, values, n + 1, c->G, 64, scores, out);
    else if (d == 128)
        attend(q, prompt_keys, prompt_values, P, keys, values, n + 1, c->G, 128, scores, out);
    else
        attend(q, prompt_keys, prompt_values, P, keys, values, n + 1, c->G, d, scores, out);
}

/* Attention of one token a row. q [B, H, d]; k, v [B, K, d]; each may be parts of wider rows. The
 * others: see `cached`. out [B, H, d]. */
void step_attention(const float *q, long q_stride, const float *k, long k_stride, const float *v,
                    long v_stride, float *keys, float *values, const int64_t *slots,
                    const int64_t *lengths, const int64_t *prompts, float *scores, long each,
                    float *out, long B, long H, long K, long C, long d) {
    long G = H / K;
    cached rows = {keys, values, slots, lengths, prompts, scores, each, K, G, C, d};
#pragma omp parallel for schedule(static) collapse(2)
    for (long b = 0; b < B; b++)
        for (long h = 0; h < K; h++)
            attend_head(&rows, b, h, q + b * q_stride + h * G * d, k + b * k_stride + h * d,
                        v + b * v_stride + h * d, out + (b * H + h * G) * d);
}

/* --- products
 *
 * W [O, D] is kept as panels [O / PANEL, D, PANEL], the last one padded with zeros. A tile of
 * ROWS x PANEL sums stays in registers; DEPTH inputs of a panel stay in the first cache while
 * BLOCK rows pass.
 */
#if LANES == 16
#define ROWS 8
#define EACH_ROW(DO) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8)
#else
#define ROWS 6
#define EACH_ROW(DO) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6)
#endif
#define PANEL (2 * LANES)
#define DEPTH 192
#define BLOCK 64

long lanes(void) { return LANES; }

/* panels of w [O, D], whose rows and columns lie as far apart as the steps say */
void pack(const float *w, long row_step, long column_step, float *panels, long O, long D) {
#pragma omp parallel for schedule(static)
    for (long o = 0; o < O; o += PANEL)
        for (long i = 0; i < D; i++)
            for (long n = 0; n < PANEL; n++)
                panels[o * D + i * PANEL + n] =
                    o + n < O ? w[(o + n) * row_step + i * column_step] : 0;
}

void unpack(const float *panels, float *w, long O, long D) {
#pragma omp parallel for schedule(static)
    for (long o = 0; o < O; o++)
        for (long i = 0; i < D; i++)
            w[o * D + i] = panels[(o / PANEL * D + i) * PANEL + o % PANEL];
}

/* to [LANES, LANES] = the transpose of `from`; rows of both are PANEL apart.
 *
 * log2(LANES) rounds of interleaving row n with row n + LANES / 2: each round moves one bit of the
 * row number into the column number. All in registers, where a loop over elements would go
 * through memory. */
static inline void transpose_tile(const float *restrict from, float *restrict to) {
    mask low, high;
    for (int n = 0; n < LANES; n++) {
        low[n] = n / 2 + n % 2 * LANES;
        high[n] = low[n] + LANES / 2;
    }
    vector rows[2][LANES];
#pragma GCC unroll 16
    for (int n = 0; n < LANES; n++) rows[0][n] = *(const vector *)(from + n * PANEL);
    int now = 0;
#pragma GCC unroll 4
    for (int step = 1; step < LANES; step *= 2, now = !now)
#pragma GCC unroll 8
        for (int n = 0; n < LANES / 2; n++) {
            vector first = rows[now][n], second = rows[now][n + LANES / 2];
            rows[!now][2 * n] = pick(first, second, low);
            rows[!now][2 * n + 1] = pick(first, second, high);
        }
#pragma GCC unroll 16
    for (int n = 0; n < LANES; n++) *(vector *)(to + n * PANEL) = rows[now][n];
}

/* `n` rows of W [O, D] from its panels, as panels of W.T [D / PANEL, n, PANEL]: a share for each
 * thread of a team. */
static void transpose_panels(const float *panels, float *transposed, long n, long D) {
#pragma omp for schedule(static) collapse(2)
    for (long i = 0; i < D; i += PANEL) {
        for (long o = 0; o < n; o += PANEL) {
            const float *from = panels + o * D + i * PANEL;
            float *to = transposed + i * n + o * PANEL;
            long rows = least(PANEL, n - o), columns = least(PANEL, D - i);
            if (rows == PANEL && columns == PANEL) {
                transpose_tile(from, to);
                transpose_tile(from + LANES, to + LANES * PANEL);
                transpose_tile(from + LANES * PANEL, to + LANES);
                transpose_tile(from + LANES * PANEL + LANES, to + LANES * PANEL + LANES);
            } else {
                for (long r = 0; r < rows; r++)
                    for (long c = 0; c < PANEL; c++)
                        to[r * PANEL + c] = c < columns ? from[c * PANEL + r] : 0;
            }
        }
    }
}

/* A matrix by the address of its first element and the distances between rows and columns; in
 * one panel of the right factor and of the result, columns are neighbours and `column` is unused. */
typedef struct {
    float *data;
    long row, column;
} matrix;

/* y [rows, columns] = scale * x [rows, D] times p [D, columns], or added to y */
static inline __attribute__((always_inline)) void tile(int rows, int vectors, long x_column,
                                                       matrix x, matrix p, matrix y, long D,
                                                       long columns, float scale, int add,
                                                       const float *next, long lines) {
    vector sum[ROWS][2];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = (vector){0};
    for (long i = 0; i < D; i++) {
        if (i < lines)
            for (int n = 0; n < PANEL; n += LINE) __builtin_prefetch(next + i * PANEL + n, 0, 2);
        const vector *right = (const vector *)(p.data + i * p.row);
        vector first = right[0], second = vectors == 2 ? right[1] : first;
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            float left = x.data[r * x.row + i * x_column];
            sum[r][0] += left * first;
            if (vectors == 2) sum[r][1] += left * second;
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        float *out = y.data + r * y.row;
        if (columns == vectors * LANES) {
            for (int n = 0; n < vectors; n++) {
                vector scaled = scale * sum[r][n], *target = (vector *)out + n;
                *target = add ? *target + scaled : scaled;
            }
        } else {
            const float *from = (const float *)sum[r];
            for (long n = 0; n < columns; n++)
                out[n] = add ? out[n] + scale * from[n] : scale * from[n];
        }
    }
}

static void tile_of(long rows, matrix x, matrix p, matrix y, long D, long columns, float scale,
                    int add, const float *next, long lines) {
    int narrow = columns == LANES; /* half of a panel's sums would be wasted */
    /* tile is inlined with constant rows, vectors and stride: its sums become registers */
#define DO(R)                                                                                  \
    case R:                                                                                    \
        if (narrow && x.column == 1)                                                           \
            tile(R, 1, 1, x, p, y, D, columns, scale, add, next, lines);                       \
        else if (narrow)                                                                       \
            tile(R, 1, x.column, x, p, y, D, columns, scale, add, next, lines);                \
        else if (x.column == 1)                                                                \
            tile(R, 2, 1, x, p, y, D, columns, scale, add, next, lines);                       \
        else                                                                                   \
            tile(R, 2, x.column, x, p, y, D, columns, scale, add, next, lines);                \
        break;
    switch (rows) { EACH_ROW(DO) }
#undef DO
}

/* `rows` rows of x times one panel. While a part of the panel is multiplied, the part behind it
 * in memory is fetched: of this panel or, if more follow, of the next. */
static void rows_by_panel(long rows, matrix x, matrix p, matrix y, long D, long columns,
                          float scale, int add, int packed, int more) {
    long tiles = (rows + ROWS - 1) / ROWS, each = (rows + tiles - 1) / tiles;
    for (long start = 0; start < D; start += DEPTH) {
        long now = least(DEPTH, D - start), left = D - start - now;
        long ahead = !packed ? 0 : left > 0 ? least(DEPTH, left) : more ? least(DEPTH, D) : 0;
        long share = (ahead + tiles - 1) / tiles;
        matrix part = {p.data + start * p.row, p.row, 0};
        for (long r = 0, fetched = 0; r < rows; r += each, fetched += share) {
            matrix from = {x.data + r * x.row + start * x.column, x.row, x.column};
            matrix to = {y.data + r * y.row, y.row, 0};
            tile_of(least(each, rows - r), from, part, to, now, columns, scale, add || start > 0,
                    part.data + (now + fetched) * PANEL, least(share, ahead - fetched));
        }
    }
}

/* A share of y [T, O] = scale * x [T, D] times p [D, O], or added to y, for each thread of a team */
static void shares(matrix x, matrix p, long p_panel, matrix y, long y_panel, long T, long D, long O,
                   float scale, int add) {
    int packed = p.row == PANEL && p_panel == D * PANEL;
    long blocks = T <= BLOCK + BLOCK / 2 ? 1 : (T + BLOCK - 1) / BLOCK;
    long block = blocks == 1 ? T : BLOCK, panels = (O + PANEL - 1) / PANEL;
#pragma omp for schedule(static) collapse(2)
    for (long b = 0; b < blocks; b++) {
        for (long n = 0; n < panels; n++) {
            matrix from = {x.data + b * block * x.row, x.row, x.column};
            matrix by = {p.data + n * p_panel, p.row, 0};
            matrix to = {y.data + b * block * y.row + n * y_panel, y.row, 0};
            rows_by_panel(least(block, T - b * block), from, by, to, D,
                          least(PANEL, O - n * PANEL), scale, add, packed, n + 1 < panels);
        }
    }
}

/* y [T, O] = scale * x [T, D] times p [D, O], or added to y where `add`.
 *
 * p: panels (packed), or a matrix whose rows are contiguous and O a multiple of `lanes()`. The
 * columns of y's panels lie y_panel apart: PANEL in a matrix.
 */
void product(float *x, long x_row, long x_column, float *p, long p_row, long p_panel, float *y,
             long y_row, long y_panel, long T, long D, long O, float scale, int add) {
    matrix left = {x, x_row, x_column}, right = {p, p_row, 0}, out = {y, y_row, 0};
#pragma omp parallel if (T * D * O >= 8 * PARALLEL_FROM)
    shares(left, right, p_panel, out, y_panel, T, D, O, scale, add);
}

/* y [T, D] = x [T, O] times W [O, D]. `some` rows of W at a time are transposed, and multiplied
 * while they are in the cache. transposed [some, D padded to panels]: scratch; some: a multiple of PANEL */
void transposed_product(float *x, long x_row, float *panels, float *transposed, float *y, long T,
                        long O, long D, long some) {
    matrix out = {y, D, 0};
#pragma omp parallel if (T * D * O >= 8 * PARALLEL_FROM)
    for (long start = 0; start < O; start += some) {
        long n = least(some, O - start);
        matrix left = {x + start, x_row, 1}, right = {transposed, PANEL, 0};
        transpose_panels(panels + start * D, transposed, n, D);
        shares(left, right, n * PANEL, out, PANEL, T, n, D, 1.0f, start > 0);
    }
}

static void low_rank_shares(matrix x, float *a, float *b, float *low, matrix y, long T, long D,
                            long R, long O) {
    matrix narrow = {a, R, 0}, middle = {low, R, 1}, wide = {b, PANEL, 0};
    shares(x, narrow, PANEL, middle, PANEL, T, D, R, 1.0f, 0);
    shares(middle, wide, R * PANEL, y, PANEL, T, R, O, 1.0f, 1);
}

/* y [T, O] += x [T, D] times a [D, R] times b [R, O], whose panels are given. low [T, R]: scratch;
 * R is a multiple of `lanes()`. */
void add_low_rank(float *x, long x_row, float *a, float *b, float *low, float *y, long y_row,
                  long T, long D, long R, long O) {
    matrix left = {x, x_row, 1}, out = {y, y_row, 0};
#pragma omp parallel if (T * R * (D + O) >= 2 * PARALLEL_FROM)
    low_rank_shares(left, a, b, low, out, T, D, R, O);
}

/* --- a decoding step
 *
 * All layers in one parallel region: between two products its threads meet at a barrier, where
 * opening a region for each product would put them to sleep and wake them again.
 */
enum { QKV, OUT, GATE_UP, DOWN, LINEARS };

typedef struct {
    const float *input_norm, *q_norm, *k_norm, *mlp_norm; /* q_norm and k_norm [d], or NULL */
    float *weights[LINEARS];                              /* panels */
    const float *qkv_bias;                                /* [(H + 2K) d], or NULL */
} block;

typedef struct {
    float *a, *b; /* [D, R] and the panels of b.T; NULL: the adapter does not target the layer */
    int64_t R;
} delta;

typedef struct {
    int64_t L, B, D, F, H, K, d, S, C;
    int64_t spans, R; /* adapters' spans of rows; the largest rank */
    int64_t each;     /* scores of a key head */
} step_shape;

#define GATED 512 /* elements that a thread takes at a time */

/* y [B, O] = x [B, D] times W.T and the adapters' products of their rows, or added to y */
static void adapted(float *x, float *panels, float *y, const delta *deltas, const int64_t *spans,
                    const step_shape *s, float *low, long D, long O, int add) {
    matrix left = {x, D, 1}, right = {panels, PANEL, 0}, out = {y, O, 0};
    shares(left, right, D * PANEL, out, PANEL, s->B, D, O, 1.0f, add);
    for (long n = 0; n < s->spans; n++) {
        long start = spans[2 * n], rows = spans[2 * n + 1] - start;
        matrix from = {x + start * D, D, 1}, to = {y + start * O, O, 0};
        if (deltas[n].a)
            low_rank_shares(from, deltas[n].a, deltas[n].b, low, to, rows, D, deltas[n].R, O);
    }
}

static void norm_rows(const float *x, const float *weight, float eps, float *y, long B, long D) {
#pragma omp for schedule(static)
    for (long b = 0; b < B; b++) norm_row(x + b * D, weight, eps, y + b * D, D);
}

static void head(float *x, const float *norm, float eps, const float *cosines, const float *sines,
                 long d) {
    if (norm) norm_row(x, norm, eps, x, d);
    rotate_head(x, cosines, sines, 1.0f, x, d);
}

/* One token a row through all layers: x [B, D], embeddings, become hidden states before the last
 * norm.
 *
 * deltas [L, LINEARS, spans]; spans [spans, 2]: rows [start, stop) of an adapter. angles: cosines
 * and sines [B, d / 2]. The cache of a layer and its prompts as in `cached`, here [L, ...].
 * scratch: B * (D + (2H + 2K) d + 3F + R + K each) floats. */
void decode_step(float *x, const block *blocks, const delta *deltas, const int64_t *spans,
                 const float *cosines, const float *sines, float eps, float *keys, float *values,
                 const int64_t *slots, const int64_t *lengths, const int64_t *prompts,
                 float *scratch, const step_shape *shape) {
    step_shape s = *shape;
    long G = s.H / s.K, heads = s.H + 2 * s.K, wide = heads * s.d, one = s.S * s.K * s.C * s.d;
    float *normed = scratch, *qkv = normed + s.B * s.D, *mixed = qkv + s.B * wide;
    float *gate_up = mixed + s.B * s.H * s.d, *inner = gate_up + 2 * s.B * s.F;
    float *low = inner + s.B * s.F, *scores = low + s.B * s.R;
    long weights = s.L * (s.D * (wide + s.H * s.d) + 3 * s.D * s.F);
#pragma omp parallel if (s.B * weights >= 8 * PARALLEL_FROM)
    for (long l = 0; l < s.L; l++) {
        const block *at = blocks + l;
        const delta *by = deltas + l * LINEARS * s.spans;
        cached rows = {keys + l * one, values + l * one, slots, lengths, prompts + 3 * l * s.B,
                       scores, s.each, s.K, G, s.C, s.d};
        norm_rows(x, at->input_norm, eps, normed, s.B, s.D);
        adapted(normed, at->weights[QKV], qkv, by + QKV * s.spans, spans, &s, low, s.D, wide, 0);
#pragma omp for schedule(static) collapse(2)
        for (long b = 0; b < s.B; b++) {
            for (long h = 0; h < s.K; h++) {
                const float *c = cosines + b * s.d / 2, *sine = sines + b * s.d / 2;
                float *row = qkv + b * wide, *q = row + h * G * s.d, *k = row + (s.H + h) * s.d;
                float *v = k + s.K * s.d;
                if (at->qkv_bias) {
                    for (long i = 0; i < G * s.d; i++) q[i] += at->qkv_bias[h * G * s.d + i];
                    for (long i = 0; i < s.d; i++) {
                        k[i] += at->qkv_bias[(s.H + h) * s.d + i];
                        v[i] += at->qkv_bias[(s.H + s.K + h) * s.d + i];
                    }
                }
                for (long g = 0; g < G; g++) head(q + g * s.d, at->q_norm, eps, c, sine, s.d);
                head(k, at->k_norm, eps, c, sine, s.d);
                attend_head(&rows, b, h, q, k, v, mixed + (b * s.H + h * G) * s.d);
            }
        }
        adapted(mixed, at->weights[OUT], x, by + OUT * s.spans, spans, &s, low, s.H * s.d, s.D, 1);
        norm_rows(x, at->mlp_norm, eps, normed, s.B, s.D);
        adapted(normed, at->weights[GATE_UP], gate_up, by + GATE_UP * s.spans, spans, &s, low, s.D,
                2 * s.F, 0);
#pragma omp for schedule(static) collapse(2)
        for (long b = 0; b < s.B; b++) {
            for (long i = 0; i < s.F; i += GATED) {
                const float *gate = gate_up + 2 * b * s.F + i;
                gated(gate, gate + s.F, inner + b * s.F + i, least(GATED, s.F - i));
            }
        }
        adapted(inner, at->weights[DOWN], x, by + DOWN * s.spans, spans, &s, low, s.F, s.D, 1);
    }
}
