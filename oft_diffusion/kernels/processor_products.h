/* Products of b x b blocks with rows of b, and what else processor.c does all its work with, compiled for each b. */

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
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

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

/* Fetch ROWS rows of b, to be written or not: they lie too far apart for a processor to see them coming. What lies beyond
 * the last is fetched in vain, also from another core, but not touched. */
#define AHEAD(x, stride, written)         \
    for (int r_ = 0; r_ < ROWS; r_++)     \
        for (int at = 0; at < b; at += 16) __builtin_prefetch((x) + r_ * (stride) + at, written)

/* The same for any number of rows. */
INLINE void product(const float *base, long base_stride, const float *x, long x_stride, const float *m, float *y,
                    long y_stride, long rows, int b) {
    long r = 0;
#define NEXT(N)                                                                                                        \
    for (; r + N <= rows; r += N) {                                                                                    \
        if (N == ROWS) {                                                                                               \
            AHEAD(x + (r + N) * x_stride, x_stride, 0);                                                                \
            AHEAD(y + (r + N) * y_stride, y_stride, 1);                                                                \
        }                                                                                                              \
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
