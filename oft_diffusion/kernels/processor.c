/* Block rotations (arXiv 2506.19847, section 3.2) and their Cayley transform on a processor, float32.
 *
 * processor.py compiles this at first use and calls it. Blocks are b x b, b one of 8, 16, 32, 64 and 128; every function
 * below is written for any b and compiled for each, so that loops of length b are unrolled and sums stay in registers.
 * A sum never depends on how many threads share the work.
 */

#include "processor_cayley.h"

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

/* ---- rotating by generators: each delta is built where it is used, in a core's cache ------------------------------ */

/* In how many parts rows are taken, so that so many equal tasks keep the threads busy: each part builds D anew, which takes
 * as long as some 4 b rows do. */
#define PARTS_OF(tasks) ((tasks) % threads == 0 || (tasks) >= 4 * threads ? 1 : parts_of(rows, threads, b))
INLINE long parts_of(long rows, int threads, int b) {
    long parts = rows / (10 * b);
    return parts < 1 ? 1 : parts < threads ? parts : threads;
}

#define ROWS_OF(parts) (((rows + (parts) - 1) / (parts) + ROWS - 1) / ROWS * ROWS) /* of each */

INLINE void rotate_built_any(const float *x, long x_stride, const float *const *packed, float *const *out, long rows,
                             long blocks, int count, int threads, int b) {
    long width = blocks * b, parts = PARTS_OF(count * blocks), step = ROWS_OF(parts);
    long tasks = count * blocks * parts;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int part = 0; part < threads; part++) {
        float delta[LARGEST] ALIGNED;
        for (long task = SHARE(part); task < SHARE(part + 1); task++) {
            long i = task / parts / blocks, block = task / parts % blocks, row = task % parts * step;
            if (row >= rows) continue;
            const float *own = x + row * x_stride + block * b;
            build(packed[i] + block * (b * (b - 1) / 2), delta, b);
            product(own, x_stride, own, x_stride, delta, out[i] + row * width + block * b, width,
                    rows - row < step ? rows - row : step, b);
        }
    }
}

/* One layer's part of one block: of dx (base + g R^T) for `rows_dx` rows from `row` on, and the generators' gradient from
 * all rows; either where it is not NULL. */
INLINE void back_built(const float *x, long x_stride, const float *packed, const float *grad, const float *base, float *dx,
                       float *found, long width, long rows, long row, long rows_dx, int b) {
    float turned[LARGEST] ALIGNED, of_delta[LARGEST] ALIGNED;
    build_turned(packed, turned, b);
    if (found) {
        delta_grad(x, x_stride, grad, width, of_delta, rows, 0, b / ROWS, b);
        unbuild(turned, of_delta, found, b);
    }
    if (dx) {
        add_to_diagonal(turned, -1.0f, b); /* R^T */
        product(base, width, grad + row * width, width, turned, dx, width, rows_dx, b);
    }
}

/* dx, where it is not NULL, and the generators' gradients, where `found` is not. A block's all rows and layers are one
 * task; where these are too few, dx is made of parts of the rows, then each layer's gradients by themselves. */
INLINE void back_built_any(const float *x, long x_stride, const float *const *packed, const float *const *grads,
                           float *dx, float *const *found, long rows, long blocks, int count, int threads, int b) {
    const long width = blocks * b, each = b * (b - 1) / 2, most = PARTS_OF(blocks);
    const int at_once = most == 1;
    for (int phase = 0; phase < 2 - at_once; phase++) {
        const int of_x = dx && !phase, of_packed = found && (at_once || phase);
        const long parts = phase ? count : most, tasks = blocks * parts, step = phase ? rows : ROWS_OF(parts);
        if (!of_x && !of_packed) continue;
#pragma omp parallel for num_threads(threads) if (threads > 1)
        for (int part = 0; part < threads; part++)
            for (long task = SHARE(part); task < SHARE(part + 1); task++) {
                long block = task / parts, own = task % parts, row = phase ? 0 : own * step;
                long some = rows - row < step ? rows - row : step, column = block * b;
                float *to = of_x && some > 0 ? dx + row * width + column : NULL;
                for (int i = phase ? own : 0; i < (phase ? own + 1 : count); i++)
                    back_built(x + column, x_stride, packed[i] + block * each, grads[i] + column, i ? to : NULL, to,
                               of_packed ? found[i] + block * each : NULL, width, rows, row, some, b);
            }
    }
}

/* ---- what Python calls ------------------------------------------------------------------------------------------ */

/* One input's rotations. What each layer has lies so many bytes behind an address, which may be 0; at most 16 read one
 * input. Python packs it: all members are of 8 bytes. */
struct call {
    const float *x;
    long x_stride;
    uintptr_t given; /* deltas, or generators */
    float *dx;
    uintptr_t found; /* their gradients */
    long numbers;    /* in x */
    long blocks, count, most_threads, size, of_generators;
    float *rows[]; /* `count` of them: what x is rotated to, or its gradients */
};
_Static_assert(sizeof(long) == 8 && sizeof(void *) == 8, "as Python packs it");

/* Of at most so many, those that so many multiplications are worth: below 2^17, another one costs more than it saves. */
INLINE int threads_of(long multiplications, long most) {
    long worth = multiplications >> 17;
    return worth < 1 ? 1 : worth < most ? worth : most;
}

#define UNPACKED                                                                                  \
    const long blocks = call->blocks, width = blocks * call->size, x_stride = call->x_stride;     \
    const long rows = width ? call->numbers / width : 0;                                          \
    const int count = call->count;                                                                \
    const int threads = threads_of(call->numbers * count * call->size, call->most_threads);       \
    const float *x = call->x, *given[16];                                                         \
    for (int i = 0; i < count; i++) given[i] = (const float *)(call->given + offsets[i])

/* By the deltas that lie there; or by those of the generators that lie there. */
void oft_rotate(const struct call *call, const uintptr_t *offsets) {
    UNPACKED;
    if (!rows) return;
#define CALL(b)                                                                                          \
    if (call->of_generators) rotate_built_any(x, x_stride, given, call->rows, rows, blocks, count, threads, b); \
    else rotate_any(x, x_stride, given, call->rows, rows, blocks, count, threads, b)
    FOR_SIZE(call->size, CALL)
#undef CALL
}

/* dx, where it is not NULL, and every dD, or the generators' gradients, where the last is not: so many bytes behind an
 * address, too. */
void oft_backward(const struct call *call, const uintptr_t *offsets, const uintptr_t *grad_offsets) {
    UNPACKED;
    const float *grads[16];
    float *dx = call->dx, *found[16];
    for (int i = 0; i < count; i++) grads[i] = call->rows[i];
    for (int i = 0; grad_offsets && i < count; i++) found[i] = (float *)(call->found + grad_offsets[i]);
    if (call->of_generators) {
#define CALL(b) back_built_any(x, x_stride, given, grads, dx, grad_offsets ? found : NULL, rows, blocks, count, threads, b)
        FOR_SIZE(call->size, CALL)
#undef CALL
        return;
    }
    if (dx && rows) {
#define CALL(b) rotate_back_any(grads, given, dx, rows, blocks, count, threads, b)
        FOR_SIZE(call->size, CALL)
#undef CALL
    }
    if (grad_offsets) {
#define CALL(b) delta_grads_any(x, x_stride, grads, found, rows, blocks, count, threads, b)
        FOR_SIZE(call->size, CALL)
#undef CALL
    }
}

void oft_build(const float *packed, float *delta, long blocks, int most_threads, int size) {
    const int threads = threads_of(4 * blocks * size * size * size, most_threads);
#define CALL(b)                                                                     \
    _Pragma("omp parallel for num_threads(threads)") for (long i = 0; i < blocks; i++) \
        build_##b(packed + i * (b * (b - 1) / 2), delta + i * b * b)
    FOR_SIZE(size, CALL)
#undef CALL
}

void oft_unbuild(const float *delta, const float *grad, float *packed, long blocks, int most_threads, int size) {
    const int threads = threads_of(2 * blocks * size * size * size, most_threads);
#define CALL(b)                                                                             \
    _Pragma("omp parallel for num_threads(threads)") for (long i = 0; i < blocks; i++) {       \
        float turned[LARGEST] ALIGNED;                                                      \
        transposed(delta + i * b * b, turned, 2.0f, b);                               \
        unbuild_##b(turned, grad + i * b * b, packed + i * (b * (b - 1) / 2));              \
    }
    FOR_SIZE(size, CALL)
#undef CALL
}
