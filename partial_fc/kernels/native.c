/* The passes over rows and probabilities that take torch several operations each, as one, in float32 on a CPU.
 *
 * Plain C without a header of Python or torch: native.py calls it with addresses and splits the rows among threads.
 * Every function walks `count` rows of `dim` floats. Row i of the matrices that are sharded (centers and optimizer
 * state) stands at index[i] where an index is given, at i where it is null. The products stay torch's.
 */

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <math.h>
#include <sys/mman.h>
#include <unistd.h>

#define INLINE static inline __attribute__((always_inline))

/* Rows asked of the memory before they are needed: with 2 KiB rows at random places the hardware guesses too late. */
#define AHEAD 8
#define LINE 64 /* bytes of a cache line */
#define SHORTEST 1e-10f /* a shorter row counts as zero: kernels/rows.py */
#define TINIEST -87.0f /* exp of less is no normal float */

/* Rows at `stride` bytes from each other. */
typedef struct {
    char *base;
    int64_t stride;
} matrix;

/* How numbers that are stored in bfloat16 are rounded: by a hash of step, row and place, whatever rank and thread has the row.
 * The row with place p of a walk has the id first + ids[p], or first + p where there are none. */
typedef struct {
    const int64_t *ids;
    int64_t first;
    uint32_t key;
} rounding;

INLINE char *row_of(matrix rows, const int64_t *index, int64_t row)
{
    return rows.base + (index ? index[row] : row) * rows.stride;
}

INLINE void prefetch(matrix rows, const int64_t *index, int64_t row, int64_t count, int64_t bytes, int write)
{
    if (!index || row >= count)
        return;
    const char *next = row_of(rows, index, row);
    if (write)
        for (int64_t i = 0; i < bytes; i += LINE)
            __builtin_prefetch(next + i, 1, 3);
    else
        for (int64_t i = 0; i < bytes; i += LINE)
            __builtin_prefetch(next + i, 0, 3);
}

INLINE void widen(const uint16_t *from, float *to, int64_t dim)
{
#pragma omp simd
    for (int64_t i = 0; i < dim; i++) {
        union { uint32_t bits; float number; } wide;
        wide.bits = (uint32_t)from[i] << 16;
        to[i] = wide.number;
    }
}

INLINE uint32_t mix(uint32_t value)
{
    value = (value ^ (value >> 16)) * 0x7feb352du;
    value = (value ^ (value >> 15)) * 0x846ca68bu;
    return value ^ (value >> 16);
}

/* Of a finite number, or an infinity. */
INLINE uint16_t round_up(float number, uint32_t random)
{
    uint32_t bits;
    memcpy(&bits, &number, sizeof bits);
    return (uint16_t)((bits + random) >> 16);
}

/* Up with the probability of what the 16 bits that are cut off are worth (kernels/rounding.py says the same in torch). One
 * hash serves two numbers: its low half the first half of the row, its high half the second. */
INLINE void round_row(const float *from, uint16_t *to, int64_t dim, uint32_t key)
{
    int64_t half = (dim + 1) / 2;
#pragma omp simd
    for (int64_t i = 0; i < dim - half; i++) {
        uint32_t random = mix(key + (uint32_t)i);
        to[i] = round_up(from[i], random & 0xffffu);
        to[half + i] = round_up(from[half + i], random >> 16);
    }
    if (dim % 2)
        to[half - 1] = round_up(from[half - 1], mix(key + (uint32_t)(half - 1)) & 0xffffu);
}

/* Of the part'th matrix of a row. */
INLINE uint32_t row_key(rounding how, int64_t row, uint32_t part)
{
    return mix((uint32_t)(how.first + (how.ids ? how.ids[row] : row)) + how.key) + (part << 16);
}

/* Raised with every change of the functions' arguments: native.py takes no file that was compiled from an older text. */
int pfc_native_version(void)
{
    return 3;
}

/* Row from_index[i] of one matrix to row to_index[i] of another, `bytes` each; i itself where an index is null. */
void pfc_copy_rows(matrix to, const int64_t *to_index, matrix from, const int64_t *from_index, int64_t count, int64_t bytes)
{
    for (int64_t row = 0; row < count; row++) {
        prefetch(from, from_index, row + AHEAD, count, bytes, 0);
        prefetch(to, to_index, row + AHEAD, count, bytes, 1);
        memcpy(row_of(to, to_index, row), row_of(from, from_index, row), bytes);
    }
}

/* Asks the system for the rows of a mapped file, without waiting for any. */
void pfc_will_need(matrix rows, const int64_t *index, int64_t count, int64_t bytes)
{
    const uintptr_t page = sysconf(_SC_PAGESIZE);
    for (int64_t row = 0; row < count; row++) {
        uintptr_t first = (uintptr_t)row_of(rows, index, row), start = first / page * page;
        posix_madvise((void *)start, first + bytes - start, POSIX_MADV_WILLNEED);
    }
}

INLINE void measure_rows(matrix rows, const int64_t *index, int64_t count, int64_t dim, float *out, float *inverse,
                         const int narrow)
{
    const int64_t bytes = dim * (narrow ? 2 : 4);
    for (int64_t row = 0; row < AHEAD; row++)
        prefetch(rows, index, row, count, bytes, 0);
    for (int64_t row = 0; row < count; row++) {
        prefetch(rows, index, row + AHEAD, count, bytes, 0);
        const void *stored = row_of(rows, index, row);
        const float *from = stored;
        if (narrow) {
            widen(stored, out + row * dim, dim);
            from = out + row * dim;
        }
        float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < dim; i++)
            squares += from[i] * from[i];
        float norm = sqrtf(squares);
        /* Beyond the range in which squares neither vanish nor overflow: measured again in double. */
        if (!(norm > 1e-15f && norm < 1e15f)) {
            double wide = 0.0;
            for (int64_t i = 0; i < dim; i++)
                wide += (double)from[i] * from[i];
            norm = (float)sqrt(wide);
        }
        inverse[row] = norm > SHORTEST ? 1.0f / norm : 0.0f;
        if (out && !narrow)
            memcpy(out + row * dim, from, bytes);
    }
}

/* inverse[i] = 1/|row i|, 0 for a row of zeros; the rows themselves in float to `out` where that is not null, as it must not be
 * where they are `narrow`, stored in bfloat16. */
void pfc_measure_rows(matrix rows, const int64_t *index, int64_t count, int64_t dim, float *out, float *inverse, int narrow)
{
    if (narrow)
        measure_rows(rows, index, count, dim, out, inverse, 1);
    else
        measure_rows(rows, index, count, dim, out, inverse, 0);
}

/* Cody and Waite's reduction with a polynomial of degree 6: within 2 units of the last place on [-87, 88]. */
INLINE float exponential(float x)
{
    float kept = x < TINIEST ? TINIEST : x;
    float shifted = kept * 1.44269504088896341f + 12582912.0f; /* 1.5 * 2^23: rounds to a whole number */
    float whole = shifted - 12582912.0f;
    float rest = kept - whole * 0.693359375f;
    rest = rest + whole * 2.12194440e-4f;
    float value = 1.9875691500e-4f;
    value = value * rest + 1.3981999507e-3f;
    value = value * rest + 8.3334519073e-3f;
    value = value * rest + 4.1665795894e-2f;
    value = value * rest + 1.6666665459e-1f;
    value = value * rest + 5.0000001201e-1f;
    value = value * rest * rest + rest + 1.0f;
    union { float number; int32_t bits; } power;
    power.bits = ((int32_t)whole + 127) << 23;
    return x < TINIEST ? 0.0f : value * power.number;
}

/* A cosine above its sample's threshold counts as square z^2 + slope z + constant + sine sqrt(1 - z^2); every exponent is
 * lowered by `shift` (kernels/hard.py). */
typedef struct {
    float square, slope, constant, sine, shift;
} hard_negatives;

INLINE void exponentials(float *products, const float *inverse, int64_t count, int64_t batch, float scale,
                         const float *threshold, hard_negatives hard, float *partial, double *total, const int any_hard)
{
    for (int64_t first = 0; first < count; first += 32) { /* few enough to add up in float */
        int64_t last = first + 32 < count ? first + 32 : count;
        memset(partial, 0, batch * sizeof(float));
        for (int64_t row = first; row < last; row++) {
            float *values = products + row * batch;
            float shrink = inverse[row], factor = shrink * scale;
#pragma omp simd
            for (int64_t i = 0; i < batch; i++) {
                float logit = values[i] * factor, by_cosine = shrink;
                if (any_hard) {
                    float z = values[i] * shrink, square = 1.0f - z * z;
                    float sine = sqrtf(square > 1e-8f ? square : 1e-8f);
                    float changed = (hard.square * z + hard.slope) * z + hard.constant + hard.sine * sine;
                    float slope = 2.0f * hard.square * z + hard.slope - hard.sine * z / sine;
                    logit = scale * (z > threshold[i] ? changed : z) - hard.shift;
                    by_cosine = z > threshold[i] ? slope * shrink : shrink;
                }
                float power = exponential(logit);
                power = values[i] < -3e38f ? 0.0f : power;
                partial[i] += power;
                values[i] = power * by_cosine;
            }
        }
        for (int64_t i = 0; i < batch; i++)
            total[i] += partial[i];
    }
}

/* From products w.x of `count` rows with `batch` embeddings, in place: p = exp(scale z), z = product * inverse[row]; 0 where
 * the product is -inf. Adds p to total[batch], and leaves p * dz'/dz * inverse[row], where z' is what z counts as. Without a
 * threshold no negative is hard. `partial` is scratch [batch]. */
void pfc_exponentials(float *products, const float *inverse, int64_t count, int64_t batch, float scale,
                      const float *threshold, hard_negatives hard, float *partial, double *total)
{
    if (threshold)
        exponentials(products, inverse, count, batch, scale, threshold, hard, partial, total, 1);
    else
        exponentials(products, inverse, count, batch, scale, threshold, hard, partial, total, 0);
}

/* What comes in as (dL/d unit row)/|w| leaves as dL/dw = (g' - (g'.unit) unit) * factor, plus decay * w. */
INLINE void finish_gradient(float *gradient, const float *weight, int64_t dim, const float *inverse, float factor,
                                   float decay)
{
    float shift = decay;
    if (inverse) {
        float along = 0.0f;
#pragma omp simd reduction(+ : along)
        for (int64_t i = 0; i < dim; i++)
            along += gradient[i] * weight[i];
        shift -= along * *inverse * *inverse * factor;
    }
#pragma omp simd
    for (int64_t i = 0; i < dim; i++)
        gradient[i] = gradient[i] * factor + shift * weight[i];
}

/* What follows steps `count` rows of several matrices, the centers first. `narrow` says that their rows of `dim` numbers are
 * stored in bfloat16: widened here, and rounded as they go back. `gradient` [count, dim] is changed; `inverse` [count], or null
 * where the gradient is by the stored rows already. */
#define MOST 3 /* matrices with rows of dim numbers */

INLINE float *open_row(matrix rows, const int64_t *index, int64_t row, int64_t dim, const int narrow, float *scratch)
{
    char *stored = row_of(rows, index, row);
    if (!narrow)
        return (float *)stored;
    widen((const uint16_t *)stored, scratch, dim);
    return scratch;
}

INLINE void close_rows(const matrix *rows, int parts, const int64_t *index, int64_t row, int64_t dim, const int narrow,
                       const float *scratch, rounding how)
{
    if (narrow)
        for (int part = 0; part < parts; part++)
            round_row(scratch + part * dim, (uint16_t *)row_of(rows[part], index, row), dim, row_key(how, row, part));
}

INLINE void prefetch_rows(const matrix *rows, int parts, const int64_t *index, int64_t row, int64_t count, int64_t dim,
                          const int narrow)
{
    for (int part = 0; part < parts; part++)
        prefetch(rows[part], index, row + AHEAD, count, dim * (narrow ? 2 : 4), 1);
}

INLINE void sgd(const matrix *rows, int moving, const int64_t *index, int64_t count, int64_t dim, float *gradient,
                const float *inverse, float factor, float rate, float momentum, float decay, int nesterov, rounding how,
                const int narrow, float *scratch)
{
    const int parts = 1 + moving;
    for (int64_t row = 0; row < count; row++) {
        prefetch_rows(rows, parts, index, row, count, dim, narrow);
        float *w = open_row(rows[0], index, row, dim, narrow, scratch), *g = gradient + row * dim;
        finish_gradient(g, w, dim, inverse ? inverse + row : NULL, factor, decay);
        if (!moving) {
#pragma omp simd
            for (int64_t i = 0; i < dim; i++)
                w[i] -= rate * g[i];
        } else {
            float *v = open_row(rows[1], index, row, dim, narrow, scratch + dim);
            float ahead = nesterov ? momentum : 1.0f, own = nesterov ? 1.0f : 0.0f;
#pragma omp simd
            for (int64_t i = 0; i < dim; i++) {
                v[i] = momentum * v[i] + g[i];
                w[i] -= rate * (own * g[i] + ahead * v[i]);
            }
        }
        close_rows(rows, parts, index, row, dim, narrow, scratch, how);
    }
}

/* One step of SGD on centers and momentum; a momentum whose base is null is none. */
void pfc_sgd(const matrix *rows, const int64_t *index, int64_t count, int64_t dim, float *gradient, const float *inverse,
             float factor, rounding how, int narrow, float rate, float momentum, float decay, int nesterov)
{
    float *scratch = narrow ? malloc(MOST * dim * sizeof(float)) : NULL;
    int moving = rows[1].base != NULL;
    if (narrow)
        sgd(rows, moving, index, count, dim, gradient, inverse, factor, rate, momentum, decay, nesterov, how, 1, scratch);
    else
        sgd(rows, moving, index, count, dim, gradient, inverse, factor, rate, momentum, decay, nesterov, how, 0, scratch);
    free(scratch);
}

INLINE void adamw(const matrix *rows, const int64_t *index, int64_t count, int64_t dim, float *gradient,
                  const float *inverse, float factor, double rate, double beta1, double beta2, float epsilon, double decay,
                  rounding how, const int narrow, float *scratch)
{
    const float blend1 = (float)(1.0 - beta1), keep2 = (float)beta2, blend2 = (float)(1.0 - beta2);
    for (int64_t row = 0; row < count; row++) {
        prefetch_rows(rows, 3, index, row, count, dim, narrow);
        float *w = open_row(rows[0], index, row, dim, narrow, scratch), *g = gradient + row * dim;
        float *m = open_row(rows[1], index, row, dim, narrow, scratch + dim);
        float *v = open_row(rows[2], index, row, dim, narrow, scratch + 2 * dim);
        finish_gradient(g, w, dim, inverse ? inverse + row : NULL, factor, 0.0f);
        double passed = *(float *)row_of(rows[3], index, row) += 1.0f;
        float size = (float)(rate / (1.0 - pow(beta1, passed))), root = (float)sqrt(1.0 - pow(beta2, passed));
        float shrink = (float)(1.0 - rate * decay);
#pragma omp simd
        for (int64_t i = 0; i < dim; i++) {
            m[i] += blend1 * (g[i] - m[i]);
            v[i] = keep2 * v[i] + blend2 * g[i] * g[i];
            w[i] = shrink * w[i] - size * m[i] / (sqrtf(v[i]) / root + epsilon);
        }
        close_rows(rows, 3, index, row, dim, narrow, scratch, how);
    }
}

/* One step of AdamW on centers, both moments, and the count of each row's steps, which is a float in any case. */
void pfc_adamw(const matrix *rows, const int64_t *index, int64_t count, int64_t dim, float *gradient, const float *inverse,
               float factor, rounding how, int narrow, double rate, double beta1, double beta2, float epsilon, double decay)
{
    float *scratch = narrow ? malloc(MOST * dim * sizeof(float)) : NULL;
    if (narrow)
        adamw(rows, index, count, dim, gradient, inverse, factor, rate, beta1, beta2, epsilon, decay, how, 1, scratch);
    else
        adamw(rows, index, count, dim, gradient, inverse, factor, rate, beta1, beta2, epsilon, decay, how, 0, scratch);
    free(scratch);
}

INLINE void adagrad(const matrix *rows, const int64_t *index, int64_t count, int64_t dim, float *gradient,
                    const float *inverse, float factor, float rate, float epsilon, float decay, rounding how,
                    const int narrow, float *scratch)
{
    for (int64_t row = 0; row < count; row++) {
        prefetch_rows(rows, 1, index, row, count, dim, narrow);
        float *w = open_row(rows[0], index, row, dim, narrow, scratch), *g = gradient + row * dim;
        float *total = (float *)row_of(rows[1], index, row);
        finish_gradient(g, w, dim, inverse ? inverse + row : NULL, factor, decay);
        float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < dim; i++)
            squares += g[i] * g[i];
        *total += squares / (float)dim;
        float size = rate / (sqrtf(*total) + epsilon);
#pragma omp simd
        for (int64_t i = 0; i < dim; i++)
            w[i] -= size * g[i];
        close_rows(rows, 1, index, row, dim, narrow, scratch, how);
    }
}

/* One step of Adagrad on centers and each row's sum of squares, a float in any case. */
void pfc_adagrad(const matrix *rows, const int64_t *index, int64_t count, int64_t dim, float *gradient, const float *inverse,
                 float factor, rounding how, int narrow, float rate, float epsilon, float decay)
{
    float *scratch = narrow ? malloc(MOST * dim * sizeof(float)) : NULL;
    if (narrow)
        adagrad(rows, index, count, dim, gradient, inverse, factor, rate, epsilon, decay, how, 1, scratch);
    else
        adagrad(rows, index, count, dim, gradient, inverse, factor, rate, epsilon, decay, how, 0, scratch);
    free(scratch);
}
