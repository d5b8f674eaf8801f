/* The Cayley transform of one block, D = R - I of a generator, and its gradient (arXiv 2506.19847, eq. 2). */

#include "processor_products.h"

/* m := m^-1 by Gauss and Jordan. No pivot is small: the symmetric part of I - Q is I, and of what is left of it at least I. */
#define INVERT(NAME, VEC, INTS)                                                                                        \
    INLINE void NAME(float *m, int b) {                                                                                \
        const int lanes = sizeof(VEC) / sizeof(float), vectors = b / lanes;                                            \
        INTS lane;                                                                                                     \
        for (int i = 0; i < lanes; i++) lane[i] = i;                                                                   \
        for (int k = 0; k < b; k++) {                                                                                  \
            float *row = m + k * b, reciprocal = 1.0f / row[k];                                                        \
            VEC pivot[128 / 8];                                                                                        \
            INTS others[128 / 8]; /* all columns but the k-th, of which nothing is left */                             \
            for (int v = 0; v < vectors; v++) {                                                                        \
                others[v] = lane + v * lanes != k;                                                                     \
                pivot[v] = (VEC)(others[v] & *(const INTS *)(row + v * lanes)) * reciprocal;                           \
                pivot[v] = (VEC)((INTS)pivot[v] | (~others[v] & (INTS)((VEC){0} + reciprocal)));                       \
                *(VEC *)(row + v * lanes) = pivot[v];                                                                  \
            }                                                                                                          \
            for (int next = 1; next < b; next++) { /* the next pivot's row first */                                    \
                float *other = m + ((k + next) & (b - 1)) * b, factor = other[k];                                      \
                for (int v = 0; v < vectors; v++)                                                                      \
                    *(VEC *)(other + v * lanes) = (VEC)(others[v] & *(INTS *)(other + v * lanes)) - factor * pivot[v]; \
            }                                                                                                          \
        }                                                                                                              \
    }
INVERT(invert_8, vec8, ints8)
INVERT(invert_wide, vec, ints)

/* The same by halves [A B; C D], whose blocks stay in the cache: with P = A^-1 and W = (D - C P B)^-1 it is
 * [P + P B W C P, -P B W; -W C P, W]. */
INLINE void invert_halved(float *m, int b) {
    const int half = b / 2, lower = half * b;
    float first[LARGEST / 4] ALIGNED, right[LARGEST / 4] ALIGNED, turned[LARGEST / 4] ALIGNED;
    float below[LARGEST / 4] ALIGNED, schur[LARGEST / 4] ALIGNED;
    for (int i = 0; i < half; i++) {
        memcpy(first + i * half, m + i * b, sizeof(float) * half);
        for (int j = 0; j < half; j++) right[i * half + j] = -m[i * b + half + j];
    }
    invert_wide(first, half);
    product(NULL, 0, first, half, right, turned, half, half, half);                  /* -P B */
    product(m + lower + half, b, m + lower, b, turned, schur, half, half, half);     /* D - C P B */
    product(NULL, 0, m + lower, b, first, below, half, half, half);                  /* C P */
    for (int i = 0; i < half * half; i++) below[i] = -below[i];
    invert_wide(schur, half);                                                        /* W */
    for (int i = 0; i < half; i++) memcpy(m + lower + half + i * b, schur + i * half, sizeof(float) * half);
    product(NULL, 0, turned, half, schur, m + half, b, half, half);                  /* -P B W */
    product(first, half, m + half, b, below, m, b, half, half);                      /* P + P B W C P */
    product(NULL, 0, schur, half, below, m + lower, b, half, half);                  /* -W C P */
}

INLINE void invert(float *m, int b) {
    if (b == 8) invert_8(m, b);
    else if (b < 64) invert_wide(m, b);
    else invert_halved(m, b);
}

/* Q of its strict upper triangle, row by row; of sign -1 its transpose. In tiles of 8 x 8, each read once. */
INLINE void unpacked(const float *packed, float *q, int sign, int b) {
    const ints8 lanes = {0, 1, 2, 3, 4, 5, 6, 7};
    float begin[8] = {0}, tile[64] ALIGNED, turned[64] ALIGNED;
    memcpy(begin + 1, packed, 7 * sizeof(float)); /* before the first row there may be no memory */
    for (int top = 0; top < b; top += 8)
        for (int left = top; left < b; left += 8) {
            for (int r = 0, i = top; r < 8; r++, i++) {
                const float *row = packed + i * (2 * b - i - 1) / 2 - i - 1; /* of Q, from its column i + 1 on */
                ints8 some = *(const ints8 *)(i || left ? row + left : begin);
                if (left == top) some &= lanes > r;
                *(ints8 *)(tile + 8 * r) = some;
            }
            turn_8(tile, turned, 8);
            for (int r = 0; r < 8; r++) {
                vec8 above = (float)sign * *(vec8 *)(tile + 8 * r), below = (float)-sign * *(vec8 *)(turned + 8 * r);
                if (left == top) above += below;
                else *(vec8 *)(q + (left + r) * b + top) = below;
                *(vec8 *)(q + (top + r) * b + left) = above;
            }
        }
}

/* (I - Q)^-1, which always is, of Q as it is unpacked. */
INLINE void inverse_of(const float *q, float *inverse, int b) {
    for (int i = 0; i < b * b; i++) inverse[i] = -q[i];
    for (int i = 0; i < b; i++) inverse[i * b + i] = 1.0f;
    invert(inverse, b);
}

/* D = 2 (I - Q)^-1 Q. As a product it keeps what near the identity would be rounded away of 2 (I - Q)^-1 - 2 I. */
INLINE void build_one(const float *packed, float *delta, int b) {
    float q[LARGEST] ALIGNED, inverse[LARGEST] ALIGNED;
    unpacked(packed, q, 1, b);
    inverse_of(q, inverse, b);
    for (int i = 0; i < b * b; i++) q[i] *= 2.0f;
    product(NULL, 0, inverse, b, q, delta, b, b, b);
}

/* (R + I)^T = 2 (I + Q)^-1 */
INLINE void build_turned_one(const float *packed, float *turned, int b) {
    float q[LARGEST] ALIGNED;
    unpacked(packed, q, -1, b);
    inverse_of(q, turned, b);
    for (int i = 0; i < b * b; i++) turned[i] *= 2.0f;
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
#define SIZED(b)                                                                                          \
    static __attribute__((noinline)) void build_##b(const float *packed, float *delta) {                  \
        build_one(packed, delta, b);                                                                      \
    }                                                                                                     \
    static __attribute__((noinline)) void build_turned_##b(const float *packed, float *turned) {          \
        build_turned_one(packed, turned, b);                                                              \
    }                                                                                                     \
    static __attribute__((noinline)) void unbuild_##b(const float *t, const float *grad, float *packed) { \
        unbuild_one(t, grad, packed, b);                                                                  \
    }
SIZED(8)
SIZED(16)
SIZED(32)
SIZED(64)
SIZED(128)

INLINE void build(const float *packed, float *delta, int b) {
#define CALL(b) build_##b(packed, delta)
    FOR_SIZE(b, CALL)
#undef CALL
}

INLINE void build_turned(const float *packed, float *turned, int b) {
#define CALL(b) build_turned_##b(packed, turned)
    FOR_SIZE(b, CALL)
#undef CALL
}

INLINE void unbuild(const float *turned, const float *grad, float *packed, int b) {
#define CALL(b) unbuild_##b(turned, grad, packed)
    FOR_SIZE(b, CALL)
#undef CALL
}

INLINE void add_to_diagonal(float *m, float number, int b) {
    for (int i = 0; i < b; i++) m[i * b + i] += number;
}
