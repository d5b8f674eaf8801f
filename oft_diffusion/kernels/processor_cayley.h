/* The Cayley transform of one block, D = R - I of a generator, and its gradient (arXiv 2506.19847, eq. 2). */

#include "processor_products.h"

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

/* D = 2 (Q + Q^2 + ... + Q^m), as `rotation._by_doubling` has it, or of 3 m terms; where Q is too large for that,
 * 2 (I - Q)^-1 Q. Of sign -1 it is D^T. */
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
