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

/* out = factor m^T + diagonal I */
INLINE void transposed(const float *m, float *out, float factor, float diagonal, int b) {
    for (int i = 0; i < b; i += 8)
        for (int j = 0; j < b; j += 8) turn_8(m + j * b + i, out + i * b + j, b);
    if (factor != 1.0f)
        for (int i = 0; i < b * b; i++) out[i] *= factor;
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

/* Of deltas, or, where they are turned, of R^T. */
INLINE void rotate_back_any(const float *const *grads, const float *const *deltas, int turned, float *out, long rows,
                            long blocks, int count, int threads, int b) {
    long width = blocks * b, step = rows_at_a_time(rows, blocks, threads), tasks = (rows + step - 1) / step * blocks;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int part = 0; part < threads; part++) {
        float made[LARGEST] ALIGNED;
        for (long task = SHARE(part); task < SHARE(part + 1); task++) {
            long block = task % blocks, row = task / blocks * step, some = rows - row < step ? rows - row : step;
            long at = row * width + block * b;
            for (int i = 0; i < count; i++) {
                const float *own = deltas[i] + block * b * b;
                if (!turned) transposed(own, made, 1.0f, 1.0f, b), own = made;
                product(i ? out + at : NULL, width, grads[i] + at, width, own, out + at, width, some, b);
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
    transposed(upper, q, 1.0f, 0.0f, b);
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

/* T G T, of T = (R + I)^T, of which the generator gets what is skew, times a factor: `rotation._CayleyDelta`. */
INLINE void unbuild_one(const float *turned, const float *grad, float *packed, float factor, int b) {
    float half[LARGEST] ALIGNED, whole[LARGEST] ALIGNED;
    product(NULL, 0, turned, b, grad, half, b, b, b);
    product(NULL, 0, half, b, turned, whole, b, b, b);
    transposed(whole, half, 1.0f, 0.0f, b);
    for (int i = 0; i < b; packed += b - 1 - i, i++)
        for (int j = i + 1; j < b; j++) packed[j - i - 1] = factor * (whole[i * b + j] - half[i * b + j]);
}

/* Every D of `count` layers, behind each other, of generators that lie apart; or R^T. */
INLINE void build_any(const float *const *packed, float *deltas, int turned, long blocks, int count, int threads, int b) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long i = 0; i < count * blocks; i++) {
        build_one(packed[i / blocks] + i % blocks * (b * (b - 1) / 2), deltas + i * b * b, turned ? -1 : 1, b);
        for (int k = 0; turned && k < b; k++) deltas[i * b * b + k * (b + 1)] += 1.0f;
    }
}

/* The generators' gradients from dD and D; or R^T, to which then I is added. */
INLINE void unbuild_any(float *deltas, int turned, const float *grads, float *const *packed, long blocks, int count,
                        int threads, int b) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long i = 0; i < count * blocks; i++) {
        float made[LARGEST] ALIGNED, *own = deltas + i * b * b;
        if (!turned) transposed(own, made, 1.0f, 1.0f, b), own = made;
        for (int k = 0; k < b; k++) own[k * (b + 1)] += 1.0f;
        unbuild_one(own, grads + i * b * b, packed[i / blocks] + i % blocks * (b * (b - 1) / 2), 0.5f, b);
    }
}

/* ---- what Python calls ------------------------------------------------------------------------------------------ */

/* What each layer has lies so many bytes behind an address, which may be 0. At most 16 layers read one input. */
#define EACH(TYPE, NAME, base, offsets) \
    TYPE NAME[16];                      \
    for (int i = 0; i < count; i++) NAME[i] = (TYPE)((base) + (offsets)[i])
#define BEHIND(TYPE, NAME, room) \
    TYPE NAME[16];               \
    for (int i = 0; i < count; i++) NAME[i] = room ? (room) + i * blocks * size * size : NULL

/* By the deltas that lie there; where there is room for deltas, by those of the generators that lie there. */
void oft_rotate(const float *x, long x_stride, uintptr_t base, const uintptr_t *offsets, float *const *out, long rows,
                long blocks, int count, int threads, int size, float *room) {
    EACH(const float *, given, base, offsets);
    BEHIND(const float *, built, room);
#define CALL(b)                                                     \
    if (room) build_any(given, room, 0, blocks, count, threads, b); \
    rotate_any(x, x_stride, room ? built : given, out, rows, blocks, count, threads, b)
    FOR_SIZE(size, CALL)
#undef CALL
}

/* dx, where it is not NULL, and every dD, or the generators' gradients, where they are to be: so many bytes behind an
 * address, too, or NULL. Room is for all R^T, then all dD. */
void oft_backward(const float *x, long x_stride, uintptr_t base, const uintptr_t *offsets, const float *const *grads,
                  float *dx, uintptr_t grad_base, const uintptr_t *grad_offsets, long rows, long blocks, int count,
                  int threads, int size, float *room) {
    EACH(const float *, given, base, offsets);
    BEHIND(const float *, built, room);
    if (room) {
#define CALL(b) build_any(given, room, 1, blocks, count, threads, b)
        FOR_SIZE(size, CALL)
#undef CALL
    }
    if (dx && rows) {
#define CALL(b) rotate_back_any(grads, room ? built : given, room != NULL, dx, rows, blocks, count, threads, b)
        FOR_SIZE(size, CALL)
#undef CALL
    }
    if (grad_offsets) {
        EACH(float *, wanted, grad_base, grad_offsets);
        float *found = room ? room + count * blocks * size * size : NULL;
        BEHIND(float *, ddeltas, found);
#define CALL(b)                                                                                          \
    delta_grads_any(x, x_stride, grads, room ? ddeltas : wanted, rows, blocks, count, threads, b);       \
    if (room) unbuild_any(room, 1, found, wanted, blocks, count, threads, b)
        FOR_SIZE(size, CALL)
#undef CALL
    }
}

void oft_build(const float *packed, float *delta, long blocks, int threads, int size) {
#define CALL(b) build_any(&packed, delta, 0, blocks, 1, threads, b)
    FOR_SIZE(size, CALL)
#undef CALL
}

void oft_unbuild(const float *delta, const float *grad, float *packed, long blocks, int threads, int size) {
#define CALL(b) unbuild_any((float *)delta, 0, grad, &packed, blocks, 1, threads, b)
    FOR_SIZE(size, CALL)
#undef CALL
}
