// The AdamW update of a matrix whose rows or columns have coefficients of their own, for CPUs.
//
// One pass over memory. Compiled without contraction of a * b + c, so that every element is rounded
// alike wherever a slice of the matrix begins or ends. `factors` holds four numbers per vector,
// `count` apart: live, decay, slope and shift.
#include <math.h>
#include <stddef.h>

typedef struct {
    float take1;  // 1 - beta1
    float beta2;
    float take2;  // 1 - beta2
} Rates;

static inline void update(float *p, float g, float *m, float *v, float live, float decay,
                          float slope, float shift, const Rates r) {
    float x = g * live;
    float first = *m + r.take1 * (x - *m);
    float second = *v * r.beta2 + r.take2 * x * x;
    *m = first;
    *v = second;
    *p = *p * decay - first / (sqrtf(second) * slope + shift);
}

void update_rows(float *restrict p, const float *restrict g, float *restrict m, float *restrict v,
                 const float *restrict factors, size_t count, size_t rows, size_t cols, Rates r) {
    for (size_t i = 0; i < rows; i++) {
        const float live = factors[i], decay = factors[count + i];
        const float slope = factors[2 * count + i], shift = factors[3 * count + i];
        for (size_t j = i * cols; j < (i + 1) * cols; j++)
            update(p + j, g[j], m + j, v + j, live, decay, slope, shift, r);
    }
}

void update_columns(float *restrict p, const float *restrict g, float *restrict m,
                    float *restrict v, const float *restrict factors, size_t count, size_t rows,
                    size_t cols, Rates r) {
    for (size_t i = 0; i < rows; i++, p += cols, g += cols, m += cols, v += cols)
        for (size_t j = 0; j < cols; j++)
            update(p + j, g[j], m + j, v + j, factors[j], factors[count + j],
                   factors[2 * count + j], factors[3 * count + j], r);
}
