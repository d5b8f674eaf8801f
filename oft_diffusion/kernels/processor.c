/* Block rotations (arXiv 2506.19847, section 3.2) and their Cayley transform on a processor, float32.
 *
 * processor.py compiles this at first use and calls it. Blocks are b x b, b one of 8, 16, 32, 64 and 128; every function
 * below is written for any b and compiled for each, so that loops of length b are unrolled and sums stay in registers.
 * A sum never depends on how many threads share the work.
 */

#include <float.h>
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
typedef int32_t ints8 __attribute__((vector_size(32), aligned(4), may_alias));
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

/* to = from^T, 8 x 8: halves change places between rows 1, 2 and 4 apart. */
INLINE void turn_8(const float *from, float *to, int b) {
    static const ints8 low[3] = {{0, 8, 2, 10, 4, 12, 6, 14}, {0, 1, 8, 9, 4, 5, 12, 13}, {0, 1, 2, 3, 8, 9, 10, 11}};
    static const ints8 high[3] = {{1, 9, 3, 11, 5, 13, 7, 15}, {2, 3, 10, 11, 6, 7, 14, 15}, {4, 5, 6, 7, 12, 13, 14, 15}};
    vec8 rows[8];
    for (int i = 0; i < 8; i++) rows[i] = *(const vec8 *)(from + i * b);
    for (int stage = 0; stage < 3; stage++)
        for (int i = 0; i < 8; i++) {
            if (i & 1 << stage) continue;
            vec8 first = rows[i], second = rows[i | 1 << stage];
            rows[i] = __builtin_shuffle(first, second, low[stage]);
            rows[i | 1 << stage] = __builtin_shuffle(first, second, high[stage]);
        }
    for (int i = 0; i < 8; i++) *(vec8 *)(to + i * b) = rows[i];
}

/* out = m^T + diagonal I */
INLINE void transposed(const float *m, float *out, float diagonal, int b) {
    for (int i = 0; i < b; i += 8)
        for (int j = 0; j < b; j += 8) turn_8(m + j * b + i, out + i * b + j, b);
    for (int i = 0; i < b; i++) out[i * b + i] += diagonal;
}

/* ---- rotating --------------------------------------------------------------------------------------------------- */

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
                transposed(deltas[i] + block * b * b, turned, 1.0f, b);
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

/* Rows of one dD, x^T grad, from tile `first` of ROWS up to `last`. Rows of x are taken in parts that stay in the cache
 * while all tiles read them. */
INLINE void delta_grad(const float *x, long x_stride, const float *grad, long width, float *out, long rows, long first,
                       long last, int b) {
    const long step = 64;
    memset(out + first * ROWS * b, 0, sizeof(float) * (last - first) * ROWS * b);
    for (long row = 0; row < rows; row += step) {
        long some = rows - row < step ? rows - row : step;
        const float *own = grad + row * width;
        for (long t = first; t < last; t++) {
            const float *columns = x + row * x_stride + t * ROWS;
            if (b == 8) outer_8(columns, x_stride, own, width, out + t * ROWS * b, some, t == first, b);
            else if (b == 16) outer_16(columns, x_stride, own, width, out + t * ROWS * b, some, t == first, b);
            else outer_wide(columns, x_stride, own, width, out + t * ROWS * b, some, t == first, b);
        }
    }
}

/* Tasks are tiles, so that two blocks keep more than two threads busy. */
INLINE void delta_grads_any(const float *x, long x_stride, const float *const *grads, float *const *out, long rows,
                            long blocks, int count, int threads, int b) {
    const long tiles = b / ROWS, tasks = count * blocks * tiles;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int part = 0; part < threads; part++)
        for (long task = SHARE(part), end; task < SHARE(part + 1); task = end) {
            end = (task / tiles + 1) * tiles; /* what is left of this dD, as far as it is this thread's */
            if (end > SHARE(part + 1)) end = SHARE(part + 1);
            long i = task / tiles / blocks, block = task / tiles % blocks, first = task % tiles;
            delta_grad(x + block * b, x_stride, grads[i] + block * b, blocks * b, out[i] + block * b * b, rows, first,
                       first + end - task, b);
        }
}

/* ---- building D ------------------------------------------------------------------------------------------------- */

INLINE float squares(const float *m, int b) {
    vec8 sums[8] = {0};
    float total = 0.0f;
    for (int i = 0; i < b * b; i += 64)
        for (int k = 0; k < 8; k++) sums[k] += *(const vec8 *)(m + i + 8 * k) * *(const vec8 *)(m + i + 8 * k);
    for (int k = 1; k < 8; k++) sums[0] += sums[k];
    for (int lane = 0; lane < 8; lane++) total += sums[0][lane];
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

/* Q of its strict upper triangle, row by row; of sign -1 its transpose. */
INLINE void unpacked(const float *packed, float *q, int sign, int b) {
    float upper[LARGEST] ALIGNED, padded[8 + LARGEST / 2] ALIGNED, *next = padded + 8;
    const ints8 lanes = {0, 1, 2, 3, 4, 5, 6, 7};
    memcpy(next, packed, sizeof(float) * b * (b - 1) / 2);
    for (int i = 0; i < b; next += b - 1 - i, i++)
        for (int j = 0; j < b; j += 8) /* what stands left of the diagonal is another row's */
            *(ints8 *)(upper + i * b + j) = *(const ints8 *)(next + j - i - 1) & (lanes + j > i);
    transposed(upper, q, 0.0f, b);
    for (int i = 0; i < b * b; i++) q[i] = sign * (upper[i] - q[i]);
}

/* D = 2 (Q + Q^2 + ... + Q^m), as `rotation._by_doubling` has it; where Q is too large for that, 2 (I - Q)^-1 Q. Of sign
 * -1 it is D^T. */
INLINE void build_one(const float *packed, float *delta, int sign, int b) {
    float q[LARGEST] ALIGNED, first[LARGEST] ALIGNED, second[LARGEST] ALIGNED, sum[LARGEST] ALIGNED, more[LARGEST] ALIGNED;
    float *power = first, *squared = second, *total = sum, *doubled = more;
    const float enough = FLT_EPSILON / 4;
    unpacked(packed, q, sign, b);
    product(NULL, 0, q, b, q, power, b, b, b);
    for (int i = 0; i < b * b; i++) total[i] = 2.0f * (q[i] + power[i]);
    for (int doubling = 1;; doubling++) {
        /* of power, squared; and so of what is left out of 2 m terms: R (power^2), and R's norm is 1 */
        float norm = squares(power, b);
        if (norm < enough) {
            product(total, b, power, b, total, delta, b, b, b);
            return;
        }
        if (norm * norm * norm < enough * enough) { /* 3 m terms are enough */
            product(total, b, power, b, total, doubled, b, b, b);
            product(total, b, power, b, doubled, delta, b, b, b);
            return;
        }
        if (doubling == 7 || (doubling > 1 && !(norm < 0.49f))) {
            for (int i = 0; i < b * b; i++) first[i] = (i % (b + 1) == 0) - q[i], q[i] *= 2.0f;
            invert(first, b);
            product(NULL, 0, first, b, q, delta, b, b, b);
            return;
        }
        product(total, b, power, b, total, doubled, b, b, b);
        product(NULL, 0, power, b, power, squared, b, b, b);
        float *other = power;
        power = squared, squared = other;
        other = total, total = doubled, doubled = other;
    }
}

/* T G T / 2, of T = (R + I)^T, of which the generator gets what is skew: `rotation._CayleyDelta`. */
INLINE void unbuild_one(const float *turned, const float *grad, float *packed, int b) {
    float half[LARGEST] ALIGNED, whole[LARGEST] ALIGNED;
    product(NULL, 0, turned, b, grad, half, b, b, b);
    product(NULL, 0, half, b, turned, whole, b, b, b);
    transposed(whole, half, 0.0f, b);
    for (int i = 0; i < b; packed += b - 1 - i, i++)
        for (int j = i + 1; j < b; j++) packed[j - i - 1] = 0.5f * (whole[i * b + j] - half[i * b + j]);
}

/* Of each size once: these are long. */
#define SIZED(b)                                                                                      \
    static __attribute__((noinline)) void build_##b(const float *packed, float *delta, int sign) {    \
        build_one(packed, delta, sign, b);                                                            \
    }                                                                                                 \
    static __attribute__((noinline)) void unbuild_##b(const float *t, const float *grad, float *packed) { \
        unbuild_one(t, grad, packed, b);                                                              \
    }
SIZED(8)
SIZED(16)
SIZED(32)
SIZED(64)
SIZED(128)

INLINE void build(const float *packed, float *delta, int sign, int b) {
#define CALL(b) build_##b(packed, delta, sign)
    FOR_SIZE(b, CALL)
#undef CALL
}

INLINE void unbuild(const float *turned, const float *grad, float *packed, int b) {
#define CALL(b) unbuild_##b(turned, grad, packed)
    FOR_SIZE(b, CALL)
#undef CALL
}

INLINE void add_identity(float *m, int b) {
    for (int i = 0; i < b; i++) m[i * b + i] += 1.0f;
}

/* ---- rotating by generators: each delta is built where it is used, in a core's cache ------------------------------ */

/* Whether so many equal tasks keep the threads busy. */
#define BALANCED(tasks) ((tasks) % threads == 0 || (tasks) >= 4 * threads)
#define ROWS_OF(parts) (((rows + (parts) - 1) / (parts) + ROWS - 1) / ROWS * ROWS) /* of each */

INLINE void rotate_built_any(const float *x, long x_stride, const float *const *packed, float *const *out, long rows,
                             long blocks, int count, int threads, int b) {
    long width = blocks * b, parts = BALANCED(count * blocks) ? 1 : threads, step = ROWS_OF(parts);
    long tasks = count * blocks * parts;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int part = 0; part < threads; part++) {
        float delta[LARGEST] ALIGNED;
        for (long task = SHARE(part); task < SHARE(part + 1); task++) {
            long i = task / parts / blocks, block = task / parts % blocks, row = task % parts * step;
            if (row >= rows) continue;
            const float *own = x + row * x_stride + block * b;
            build(packed[i] + block * (b * (b - 1) / 2), delta, 1, b);
            product(own, x_stride, own, x_stride, delta, out[i] + row * width + block * b, width,
                    rows - row < step ? rows - row : step, b);
        }
    }
}

/* dx, where it is not NULL, and the generators' gradients, where `found` is not. A block's all rows and layers are one
 * task; where these are too few, dx is made of parts of the rows, then each layer's gradients by themselves. */
INLINE void back_built_any(const float *x, long x_stride, const float *const *packed, const float *const *grads,
                           float *dx, float *const *found, long rows, long blocks, int count, int threads, int b) {
    const long width = blocks * b, each = b * (b - 1) / 2;
    const int at_once = BALANCED(blocks);
    for (int phase = 0; phase < 2 - at_once; phase++) {
        const int of_x = dx && !phase, of_packed = found && (at_once || phase);
        const long parts = at_once ? 1 : phase ? count : threads, tasks = blocks * parts;
        const long step = phase ? rows : ROWS_OF(parts);
        if (!of_x && !of_packed) continue;
#pragma omp parallel for num_threads(threads) if (threads > 1)
        for (int part = 0; part < threads; part++) {
            float turned[LARGEST] ALIGNED, of_delta[LARGEST] ALIGNED;
            for (long task = SHARE(part); task < SHARE(part + 1); task++) {
                long block = task / parts, own = task % parts, row = phase ? 0 : own * step;
                long some = rows - row < step ? rows - row : step, at = row * width + block * b;
                for (int i = phase ? own : 0; i < (phase ? own + 1 : count); i++) {
                    build(packed[i] + block * each, turned, -1, b);
                    add_identity(turned, b);
                    if (of_x && some > 0)
                        product(i ? dx + at : NULL, width, grads[i] + at, width, turned, dx + at, width, some, b);
                    if (of_packed) {
                        delta_grad(x + block * b, x_stride, grads[i] + block * b, width, of_delta, rows, 0, b / ROWS, b);
                        add_identity(turned, b);
                        unbuild(turned, of_delta, found[i] + block * each, b);
                    }
                }
            }
        }
    }
}

/* ---- what Python calls ------------------------------------------------------------------------------------------ */

/* What each layer has lies so many bytes behind an address, which may be 0. At most 16 layers read one input. */
#define EACH(TYPE, NAME, base, offsets) \
    TYPE NAME[16];                      \
    for (int i = 0; i < count; i++) NAME[i] = (TYPE)((base) + (offsets)[i])

/* By the deltas that lie there; or by those of the generators that lie there. */
void oft_rotate(const float *x, long x_stride, uintptr_t base, const uintptr_t *offsets, float *const *out, long rows,
                long blocks, int count, int threads, int size, int of_generators) {
    EACH(const float *, given, base, offsets);
#define CALL(b)                                                                                     \
    if (of_generators) rotate_built_any(x, x_stride, given, out, rows, blocks, count, threads, b);  \
    else rotate_any(x, x_stride, given, out, rows, blocks, count, threads, b)
    FOR_SIZE(size, CALL)
#undef CALL
}

/* dx, where it is not NULL, and every dD, or the generators' gradients, where they are to be: so many bytes behind an
 * address, too, or NULL. */
void oft_backward(const float *x, long x_stride, uintptr_t base, const uintptr_t *offsets, const float *const *grads,
                  float *dx, uintptr_t grad_base, const uintptr_t *grad_offsets, long rows, long blocks, int count,
                  int threads, int size, int of_generators) {
    float *found[16];
    EACH(const float *, given, base, offsets);
    for (int i = 0; grad_offsets && i < count; i++) found[i] = (float *)(grad_base + grad_offsets[i]);
    if (of_generators) {
#define CALL(b) back_built_any(x, x_stride, given, grads, dx, grad_offsets ? found : NULL, rows, blocks, count, threads, b)
        FOR_SIZE(size, CALL)
#undef CALL
        return;
    }
    if (dx && rows) {
#define CALL(b) rotate_back_any(grads, given, dx, rows, blocks, count, threads, b)
        FOR_SIZE(size, CALL)
#undef CALL
    }
    if (grad_offsets) {
#define CALL(b) delta_grads_any(x, x_stride, grads, found, rows, blocks, count, threads, b)
        FOR_SIZE(size, CALL)
#undef CALL
    }
}

void oft_build(const float *packed, float *delta, long blocks, int threads, int size) {
#define CALL(b)                                                                     \
    _Pragma("omp parallel for num_threads(threads)") for (long i = 0; i < blocks; i++) \
        build_##b(packed + i * (b * (b - 1) / 2), delta + i * b * b, 1)
    FOR_SIZE(size, CALL)
#undef CALL
}

void oft_unbuild(const float *delta, const float *grad, float *packed, long blocks, int threads, int size) {
#define CALL(b)                                                                             \
    _Pragma("omp parallel for num_threads(threads)") for (long i = 0; i < blocks; i++) {       \
        float turned[LARGEST] ALIGNED;                                                      \
        transposed(delta + i * b * b, turned, 2.0f, b);                               \
        unbuild_##b(turned, grad + i * b * b, packed + i * (b * (b - 1) / 2));              \
    }
    FOR_SIZE(size, CALL)
#undef CALL
}
