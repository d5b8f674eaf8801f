/* Block rotations (arXiv 2506.19847, section 3.2) and their Cayley transform on a processor, float32.
 *
 * processor.py compiles this at first use and calls it. Blocks are b x b, b one of 8, 16, 32, 64 and 128; every function
 * below is written for any b and compiled for each, so that loops of length b are unrolled and sums stay in registers.
 * A sum never depends on how many threads share the work.
 */

#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define ALIGNED __attribute__((aligned(64)))
#define LARGEST (128 * 128)
#define ROWS 8 /* of a tile whose sums are kept in registers, with two vectors of columns */

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
typedef float vec8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* `CALL(b)` for the b that is asked for, as a constant. */
#define FOR_SIZE(b, CALL)          \
    switch (b) {                   \
    case 8: CALL(8); break;        \
    case 16: CALL(16); break;      \
    case 32: CALL(32); break;      \
    case 64: CALL(64); break;      \
    case 128: CALL(128); break;    \
    }

/* The first task of a thread's share: equal ones, in order. */
#define SHARE(part) (tasks * (part) / threads)

/* y = base + x m for `rows` (at most ROWS) rows of b; base may be y itself, or NULL for 0.
 * The product is summed first: of a small m it is exact to a part of what adding to a large base rounds away. */
#define TILE(NAME, VEC, VECTORS)                                                                                       \
    INLINE void NAME(const float *base, long base_stride, const float *x, long x_stride, const float *m, float *y,     \
                     long y_stride, int rows, int b) {                                                                 \
        const int lanes = sizeof(VEC) / sizeof(float);                                                                 \
        for (int column = 0; column < b; column += VECTORS * lanes) {                                                  \
            VEC sum[ROWS][VECTORS];                                                                                    \
            for (int r = 0; r < rows; r++)                                                                             \
                for (int v = 0; v < VECTORS; v++) sum[r][v] = (VEC){0};                                                \
            for (int k = 0; k < b; k++) {                                                                              \
                VEC of_m[VECTORS];                                                                                     \
                for (int v = 0; v < VECTORS; v++) of_m[v] = *(const VEC *)(m + k * b + column + v * lanes);            \
                for (int r = 0; r < rows; r++)                                                                         \
                    for (int v = 0; v < VECTORS; v++) sum[r][v] += x[r * x_stride + k] * of_m[v];                      \
            }                                                                                                          \
            for (int r = 0; r < rows; r++)                                                                             \
                for (int v = 0; v < VECTORS; v++) {                                                                    \
                    long at = column + v * lanes;                                                                      \
                    if (base) sum[r][v] += *(const VEC *)(base + r * base_stride + at);                                \
                    *(VEC *)(y + r * y_stride + at) = sum[r][v];                                                       \
                }                                                                                                      \
        }                                                                                                              \
    }
TILE(tile_8, vec8, 1)
TILE(tile_16, vec8, 2)
TILE(tile_wide, vec, 2)

INLINE void tile(const float *base, long base_stride, const float *x, long x_stride, const float *m, float *y,
                 long y_stride, int rows, int b) {
    if (b == 8) tile_8(base, base_stride, x, x_stride, m, y, y_stride, rows, b);
    else if (b == 16) tile_16(base, base_stride, x, x_stride, m, y, y_stride, rows, b);
    else tile_wide(base, base_stride, x, x_stride, m, y, y_stride, rows, b);
}

/* Fetch ROWS rows of b: they lie too far apart for a processor to see them coming. Beyond the end that does no harm. */
INLINE void ahead(const float *x, long stride, int b) {
    for (int r = 0; r < ROWS; r++)
        for (int at = 0; at < b; at += 16) __builtin_prefetch(x + r * stride + at);
}

/* The same for any number of rows. */
INLINE void product(const float *base, long base_stride, const float *x, long x_stride, const float *m, float *y,
                    long y_stride, long rows, int b) {
    long r = 0;
#define NEXT(N)                                                                                                        \
    for (; r + N <= rows; r += N) {                                                                                    \
        if (N == ROWS) ahead(x + (r + N) * x_stride, x_stride, b), ahead(y + (r + N) * y_stride, y_stride, b);         \
        tile(base ? base + r * base_stride : base, base_stride, x + r * x_stride, x_stride, m, y + r * y_stride,       \
             y_stride, N, b);                                                                                          \
    }
    NEXT(ROWS);
    NEXT(4);
    NEXT(1);
#undef NEXT
}

/* ---- rotating --------------------------------------------------------------------------------------------------- */

INLINE void transposed(const float *d, float *out, float factor, float diagonal, int b) {
    for (int i = 0; i < b; i++)
        for (int j = 0; j < b; j++) out[i * b + j] = factor * d[j * b + i];
    for (int i = 0; i < b; i++) out[i * b + i] += diagonal;
}

/* Rows of a task: few enough that what a task reads and writes stays in a core's cache, many enough that each thread has
 * two tasks and that turning D around costs little. */
INLINE long rows_at_a_time(long rows, long blocks, int threads) {
    long parts = rows / 256, wanted = (2 * threads + blocks - 1) / blocks;
    if (parts < wanted) parts = wanted;
    if (parts < 1) parts = 1;
    return ((rows + parts - 1) / parts + ROWS - 1) / ROWS * ROWS;
}

INLINE void rotate_any(const float *x, long x_stride, const float *const *deltas, float *const *out, long rows,
                       long blocks, int count, int threads, int b) {
    long width = blocks * b, step = rows_at_a_time(rows, blocks, threads);
    long each = (rows + step - 1) / step * blocks, tasks = count * each;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int part = 0; part < threads; part++)
        for (long task = SHARE(part); task < SHARE(part + 1); task++) {
            long i = task / each, block = task % blocks, row = task % each / blocks * step;
            const float *own = x + row * x_stride + block * b;
            product(own, x_stride, own, x_stride, deltas[i] + block * b * b, out[i] + row * width + block * b, width,
                    rows - row < step ? rows - row : step, b);
        }
}

INLINE void rotate_back_any(const float *const *grads, const float *const *deltas, float *out, long rows, long blocks,
                            int count, int threads, int b) {
    long width = blocks * b, step = rows_at_a_time(rows, blocks, threads), tasks = (rows + step - 1) / step * blocks;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int part = 0; part < threads; part++) {
        float turned[LARGEST] ALIGNED;
        for (long task = SHARE(part); task < SHARE(part + 1); task++) {
            long block = task % blocks, row = task / blocks * step, some = rows - row < step ? rows - row : step;
            long at = row * width + block * b;
            for (int i = 0; i < count; i++) {
                transposed(deltas[i] + block * b * b, turned, 1.0f, 1.0f, b);
                product(i ? out + at : NULL, width, grads[i] + at, width, turned, out + at, width, some, b);
            }
        }
    }
}

/* out += x^T grad for ROWS columns of x and b of grad; cold: nobody has read these rows of the block yet. */
#define OUTER(NAME, VEC, VECTORS)                                                                                      \
    INLINE void NAME(const float *x, long x_stride, const float *grad, long width, float *out, long rows, int cold,    \
                     int b) {                                                                                          \
        const int lanes = sizeof(VEC) / sizeof(float);                                                                 \
        for (int column = 0; column < b; column += VECTORS * lanes) {                                                  \
            VEC sum[ROWS][VECTORS];                                                                                    \
            for (int k = 0; k < ROWS; k++)                                                                             \
                for (int v = 0; v < VECTORS; v++) sum[k][v] = *(VEC *)(out + k * b + column + v * lanes);              \
            for (long r = 0; r < rows; r++) {                                                                          \
                VEC of_grad[VECTORS];                                                                                  \
                if (cold) {                                                                                            \
                    for (int at = 0; at < b; at += 16) __builtin_prefetch(x + (r + ROWS) * x_stride + at);             \
                    for (int at = 0; at < b; at += 16) __builtin_prefetch(grad + (r + ROWS) * width + at);             \
                }                                                                                                      \
                for (int v = 0; v < VECTORS; v++) of_grad[v] = *(const VEC *)(grad + r * width + column + v * lanes);  \
                for (int k = 0; k < ROWS; k++)                                                                         \
                    for (int v = 0; v < VECTORS; v++) sum[k][v] += x[r * x_stride + k] * of_grad[v];                   \
            }                                                                                                          \
            for (int k = 0; k < ROWS; k++)                                                                             \
                for (int v = 0; v < VECTORS; v++) *(VEC *)(out + k * b + column + v * lanes) = sum[k][v];              \
        }                                                                                                              \
    }
OUTER(outer_8, vec8, 1)
OUTER(outer_16, vec8, 2)
OUTER(outer_wide, vec, 2)

/* Tasks are ROWS rows of one dD, so that two blocks keep more than two threads busy. Rows are taken in parts that stay in
 * the cache while all tasks of a block read them. */
INLINE void delta_grads_any(const float *x, long x_stride, const float *const *grads, float *const *out, long rows,
                            long blocks, int count, int threads, int b) {
    const long width = blocks * b, tiles = b / ROWS, tasks = count * blocks * tiles, step = 64;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int part = 0; part < threads; part++)
        for (long task = SHARE(part), end; task < SHARE(part + 1); task = end) {
            end = (task / tiles + 1) * tiles; /* what is left of this dD, as far as it is this thread's */
            if (end > SHARE(part + 1)) end = SHARE(part + 1);
            long i = task / tiles / blocks, block = task / tiles % blocks, first = task % tiles, last = first + end - task;
            float *own = out[i] + block * b * b;
            memset(own + first * ROWS * b, 0, sizeof(float) * (last - first) * ROWS * b);
            for (long row = 0; row < rows; row += step) {
                long some = rows - row < step ? rows - row : step;
                const float *grad = grads[i] + row * width + block * b;
                for (long t = first; t < last; t++) {
                    const float *columns = x + row * x_stride + block * b + t * ROWS;
                    if (b == 8) outer_8(columns, x_stride, grad, width, own + t * ROWS * b, some, t == first, b);
                    else if (b == 16) outer_16(columns, x_stride, grad, width, own + t * ROWS * b, some, t == first, b);
                    else outer_wide(columns, x_stride, grad, width, own + t * ROWS * b, some, t == first, b);
                }
            }
        }
}

/* ---- building D ------------------------------------------------------------------------------------------------- */

INLINE float squares(const float *m, int b) {
    vec8 sum = {0};
    float total = 0.0f;
    for (int i = 0; i < b * b; i += 8) sum += *(const vec8 *)(m + i) * *(const vec8 *)(m + i);
    for (int lane = 0; lane < 8; lane++) total += sum[lane];
    return total;
}

/* m := m^-1 by Gauss and Jordan. No pivot is small: I - Q has I for its symmetric part, and so has what is left of it. */
INLINE void invert(float *m, int b) {
    for (int k = 0; k < b; k++) {
        float *row = m + k * b, reciprocal = 1.0f / row[k];
        row[k] = 1.0f;
        for (int j = 0; j < b; j++) row[j] *= reciprocal;
        for (int i = 0; i < b; i++) {
            if (i == k) continue;
            float factor = m[i * b + k];
            m[i * b + k] = 0.0f;
            for (int j = 0; j < b; j++) m[i * b + j] -= factor * row[j];
        }
    }
}

/* D = 2 (Q + Q^2 + ... + Q^m), as `rotation._by_doubling` has it; where Q is too large for that, 2 (I - Q)^-1 Q. */
INLINE void build_one(const float *packed, float *delta, float epsilon, int b) {
    float q[LARGEST] ALIGNED, first[LARGEST] ALIGNED, second[LARGEST] ALIGNED, sum[LARGEST] ALIGNED, more[LARGEST] ALIGNED;
    float *power = first, *squared = second, *total = sum, *doubled = more;
    for (int i = 0; i < b; i++) {
        q[i * b + i] = 0.0f;
        for (int j = i + 1; j < b; j++, packed++) q[i * b + j] = *packed, q[j * b + i] = -*packed;
    }
    product(NULL, 0, q, b, q, power, b, b, b);
    for (int i = 0; i < b * b; i++) total[i] = q[i] + power[i];
    for (int doubling = 1;; doubling++) {
        float norm = squares(power, b); /* squared, and so of what is left out: R (power^2), and R's norm is 1 */
        if (norm < epsilon / 4) {
            product(total, b, power, b, total, delta, b, b, b);
            break;
        }
        if (doubling == 7 || (doubling > 1 && !(norm < 0.49f))) {
            for (int i = 0; i < b * b; i++) first[i] = (i % (b + 1) == 0) - q[i];
            invert(first, b);
            product(NULL, 0, first, b, q, delta, b, b, b);
            break;
        }
        product(total, b, power, b, total, doubled, b, b, b);
        product(NULL, 0, power, b, power, squared, b, b, b);
        float *other = power;
        power = squared, squared = other;
        other = total, total = doubled, doubled = other;
    }
    for (int i = 0; i < b * b; i++) delta[i] *= 2.0f;
}

/* (R + I)^T G (R + I)^T / 2, of which the generator gets what is skew: `rotation._CayleyDelta`. */
INLINE void unbuild_one(const float *delta, const float *grad, float *packed, int b) {
    float turned[LARGEST] ALIGNED, half[LARGEST] ALIGNED, whole[LARGEST] ALIGNED;
    transposed(delta, turned, 0.5f, 1.0f, b);
    product(NULL, 0, turned, b, grad, half, b, b, b);
    product(NULL, 0, half, b, turned, whole, b, b, b);
    for (int i = 0; i < b; i++)
        for (int j = i + 1; j < b; j++) *packed++ = 2.0f * (whole[i * b + j] - whole[j * b + i]);
}

/* ---- what Python calls ------------------------------------------------------------------------------------------ */

/* Deltas lie so many bytes behind an address, which may be 0. At most 16 layers read one input. */
#define DELTAS_AT(TYPE, NAME, base, offsets) \
    TYPE NAME[16];                           \
    for (int i = 0; i < count; i++) NAME[i] = (TYPE)((base) + (offsets)[i])

void oft_rotate(const float *x, long x_stride, uintptr_t base, const uintptr_t *offsets, float *const *out, long rows,
                long blocks, int count, int threads, int size) {
    DELTAS_AT(const float *, deltas, base, offsets);
#define CALL(b) rotate_any(x, x_stride, deltas, out, rows, blocks, count, threads, b)
    FOR_SIZE(size, CALL)
#undef CALL
}

/* dx, where it is not NULL, and every dD, where they are to be: so many bytes behind an address, too, or NULL. */
void oft_backward(const float *x, long x_stride, uintptr_t base, const uintptr_t *offsets, const float *const *grads,
                  float *dx, uintptr_t grad_base, const uintptr_t *grad_offsets, long rows, long blocks, int count,
                  int threads, int size) {
    if (dx && rows) {
        DELTAS_AT(const float *, deltas, base, offsets);
#define CALL(b) rotate_back_any(grads, deltas, dx, rows, blocks, count, threads, b)
        FOR_SIZE(size, CALL)
#undef CALL
    }
    if (grad_offsets) {
        DELTAS_AT(float *, ddeltas, grad_base, grad_offsets);
#define CALL(b) delta_grads_any(x, x_stride, grads, ddeltas, rows, blocks, count, threads, b)
        FOR_SIZE(size, CALL)
#undef CALL
    }
}

void oft_build(const float *packed, float *delta, long blocks, float epsilon, int threads, int size) {
#define CALL(b)                                                                     \
    _Pragma("omp parallel for num_threads(threads)") for (long i = 0; i < blocks; i++) \
        build_one(packed + i * (b * (b - 1) / 2), delta + i * b * b, epsilon, b)
    FOR_SIZE(size, CALL)
#undef CALL
}

void oft_unbuild(const float *delta, const float *grad, float *packed, long blocks, int threads, int size) {
#define CALL(b)                                                                     \
    _Pragma("omp parallel for num_threads(threads)") for (long i = 0; i < blocks; i++) \
        unbuild_one(delta + i * b * b, grad + i * b * b, packed + i * (b * (b - 1) / 2), b)
    FOR_SIZE(size, CALL)
#undef CALL
}
