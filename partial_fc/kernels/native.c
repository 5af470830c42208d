/* The passes over rows and probabilities that take torch several operations each, as one, in float32 on a CPU.
 *
 * Plain C without a header of Python or torch: native.py calls it with addresses and splits the rows among threads.
 * Every function walks `count` rows of `dim` floats. Row i of the matrices that are sharded (centers and optimizer
 * state) stands at index[i] where an index is given, at i where it is null. The products stay torch's.
 */

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <math.h>

#define INLINE static inline __attribute__((always_inline))

/* Rows asked of the memory before they are needed: with 2 KiB rows at random places the hardware guesses too late. */
#define AHEAD 8
#define LINE 16 /* floats of a cache line */
#define SHORTEST 1e-10f /* a shorter row counts as zero: kernels/rows.py */
#define TINIEST -87.0f /* exp of less is no normal float */

INLINE float *row_of(float *matrix, const int64_t *index, int64_t row, int64_t dim)
{
    return matrix + (index ? index[row] : row) * dim;
}

INLINE void prefetch(float *matrix, const int64_t *index, int64_t row, int64_t count, int64_t dim, int write)
{
    if (!index || row >= count)
        return;
    float *next = row_of(matrix, index, row, dim);
    if (write)
        for (int64_t i = 0; i < dim; i += LINE)
            __builtin_prefetch(next + i, 1, 3);
    else
        for (int64_t i = 0; i < dim; i += LINE)
            __builtin_prefetch(next + i, 0, 3);
}

/* Raised with every change of the functions' arguments: native.py takes no file that was compiled from an older text. */
int pfc_native_version(void)
{
    return 1;
}

/* inverse[i] = 1/|row i|, 0 for a row of zeros; the rows themselves to `out` where that is not null. */
void pfc_measure_rows(float *matrix, const int64_t *index, int64_t count, int64_t dim, float *out, float *inverse)
{
    for (int64_t row = 0; row < AHEAD; row++)
        prefetch(matrix, index, row, count, dim, 0);
    for (int64_t row = 0; row < count; row++) {
        prefetch(matrix, index, row + AHEAD, count, dim, 0);
        const float *from = row_of(matrix, index, row, dim);
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
        if (out)
            memcpy(out + row * dim, from, dim * sizeof(float));
    }
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

/* From products w.x of `count` rows with `batch` embeddings, in place: p = exp(scale z), z = product * inverse[row]; 0 where
 * z > ceiling or the product is -inf. Adds p to total[batch], and leaves p * inverse[row]. `partial` is scratch [batch]. */
void pfc_exponentials(float *products, const float *inverse, int64_t count, int64_t batch, float scale, float ceiling,
                      float *partial, double *total)
{
    for (int64_t first = 0; first < count; first += 32) { /* few enough to add up in float */
        int64_t last = first + 32 < count ? first + 32 : count;
        memset(partial, 0, batch * sizeof(float));
        for (int64_t row = first; row < last; row++) {
            float *values = products + row * batch;
            float shrink = inverse[row], factor = shrink * scale, most = ceiling * scale;
#pragma omp simd
            for (int64_t i = 0; i < batch; i++) {
                float logit = values[i] * factor;
                float power = exponential(logit);
                power = logit > most || values[i] < -3e38f ? 0.0f : power;
                partial[i] += power;
                values[i] = power * shrink;
            }
        }
        for (int64_t i = 0; i < batch; i++)
            total[i] += partial[i];
    }
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

/* One step of SGD. `gradient` [count, dim] is changed; `inverse` [count], or null where the gradient is by the stored rows
 * already; `velocity` null without momentum. */
void pfc_sgd(float *weight, float *velocity, const int64_t *index, int64_t count, int64_t dim, float *gradient,
             const float *inverse, float factor, float rate, float momentum, float decay, int nesterov)
{
    for (int64_t row = 0; row < count; row++) {
        prefetch(weight, index, row + AHEAD, count, dim, 1);
        if (velocity)
            prefetch(velocity, index, row + AHEAD, count, dim, 1);
        float *w = row_of(weight, index, row, dim), *g = gradient + row * dim;
        finish_gradient(g, w, dim, inverse ? inverse + row : NULL, factor, decay);
        if (!velocity) {
#pragma omp simd
            for (int64_t i = 0; i < dim; i++)
                w[i] -= rate * g[i];
            continue;
        }
        float *v = row_of(velocity, index, row, dim);
        float ahead = nesterov ? momentum : 1.0f, own = nesterov ? 1.0f : 0.0f;
#pragma omp simd
        for (int64_t i = 0; i < dim; i++) {
            v[i] = momentum * v[i] + g[i];
            w[i] -= rate * (own * g[i] + ahead * v[i]);
        }
    }
}

/* One step of AdamW; `steps` counts each row's. */
void pfc_adamw(float *weight, float *first, float *second, float *steps, const int64_t *index, int64_t count, int64_t dim,
               float *gradient, const float *inverse, float factor, double rate, double beta1, double beta2, float epsilon,
               double decay)
{
    const float blend1 = (float)(1.0 - beta1), keep2 = (float)beta2, blend2 = (float)(1.0 - beta2);
    for (int64_t row = 0; row < count; row++) {
        prefetch(weight, index, row + AHEAD, count, dim, 1);
        prefetch(first, index, row + AHEAD, count, dim, 1);
        prefetch(second, index, row + AHEAD, count, dim, 1);
        float *w = row_of(weight, index, row, dim), *g = gradient + row * dim;
        float *m = row_of(first, index, row, dim), *v = row_of(second, index, row, dim);
        finish_gradient(g, w, dim, inverse ? inverse + row : NULL, factor, 0.0f);
        double passed = *row_of(steps, index, row, 1) += 1.0f;
        float size = (float)(rate / (1.0 - pow(beta1, passed))), root = (float)sqrt(1.0 - pow(beta2, passed));
        float shrink = (float)(1.0 - rate * decay);
#pragma omp simd
        for (int64_t i = 0; i < dim; i++) {
            m[i] += blend1 * (g[i] - m[i]);
            v[i] = keep2 * v[i] + blend2 * g[i] * g[i];
            w[i] = shrink * w[i] - size * m[i] / (sqrtf(v[i]) / root + epsilon);
        }
    }
}

/* One step of Adagrad with one number of state a row. */
void pfc_adagrad(float *weight, float *sum, const int64_t *index, int64_t count, int64_t dim, float *gradient,
                 const float *inverse, float factor, float rate, float epsilon, float decay)
{
    for (int64_t row = 0; row < count; row++) {
        prefetch(weight, index, row + AHEAD, count, dim, 1);
        float *w = row_of(weight, index, row, dim), *g = gradient + row * dim, *total = row_of(sum, index, row, 1);
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
    }
}
