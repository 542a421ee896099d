// The AdamW update of matrices whose rows or columns have coefficients of their own, for CPUs.
//
// One pass over memory. Compiled without contraction of a * b + c, so that every element is rounded
// alike wherever a slice of a matrix begins or ends. `factors` holds four numbers per vector,
// `count` apart: live, decay, slope and shift.
#include <math.h>
#include <stddef.h>
#include <stdint.h>

typedef struct {
    float take1;  // 1 - beta1
    float beta2;
    float take2;  // 1 - beta2
} Rates;

typedef struct {
    int64_t at;  // offset of its first element in the flat tensors
    int64_t rows;
    int64_t cols;
    int64_t axis;   // 0 if the rows are the vectors, 1 if the columns are
    int64_t first;  // place of its first vector in `factors`
} Rectangle;

static inline void update(float *p, float g, float *m, float *v, float live, float decay,
                          float slope, float shift, const Rates r) {
    float x = g * live;
    float first = *m + r.take1 * (x - *m);
    float second = *v * r.beta2 + r.take2 * x * x;
    *m = first;
    *v = second;
    *p = *p * decay - first / (sqrtf(second) * slope + shift);
}

static void update_rows(float *restrict p, const float *restrict g, float *restrict m,
                        float *restrict v, const float *restrict factors, size_t count, size_t rows,
                        size_t cols, Rates r) {
    for (size_t i = 0; i < rows; i++) {
        const float live = factors[i], decay = factors[count + i];
        const float slope = factors[2 * count + i], shift = factors[3 * count + i];
        for (size_t j = i * cols; j < (i + 1) * cols; j++)
            update(p + j, g[j], m + j, v + j, live, decay, slope, shift, r);
    }
}

static void update_columns(float *restrict p, const float *restrict g, float *restrict m,
                           float *restrict v, const float *restrict factors, size_t count,
                           size_t rows, size_t cols, Rates r) {
    for (size_t i = 0; i < rows; i++, p += cols, g += cols, m += cols, v += cols)
        for (size_t j = 0; j < cols; j++)
            update(p + j, g[j], m + j, v + j, factors[j], factors[count + j],
                   factors[2 * count + j], factors[3 * count + j], r);
}

// Shares [from, to) of `parts` equal ones of the rows of every rectangle.
void update_blocks(float *p, const float *g, float *m, float *v, const Rectangle *blocks,
                   size_t number, const float *factors, size_t count, size_t from, size_t to,
                   size_t parts, Rates r) {
    for (const Rectangle *block = blocks; block < blocks + number; block++) {
        const size_t top = block->rows * from / parts, end = block->rows * to / parts;
        const size_t at = block->at + top * block->cols;
        const float *own = factors + block->first + (block->axis ? 0 : top);
        (block->axis ? update_columns : update_rows)(p + at, g + at, m + at, v + at, own, count,
                                                     end - top, block->cols, r);
    }
}
