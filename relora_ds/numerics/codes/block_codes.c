// Eight-bit codes to fp32 and back, for CPUs: the same bits as `Codes.load` and `Codes.store`.
//
// A code's sign is its element's. The code of a share of the block's largest magnitude is found by
// the upper half of the share's bits: `nearby` has the first code of everything that begins with
// them, and no more than one border between two codes lies within.
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { BLOCK = 256, NEARBY = 0x3F80 };  // 0x3F80 is what one begins with

static inline size_t length(size_t count, size_t at) {
    return count - at < BLOCK ? count - at : BLOCK;
}

static void store_block(const float *restrict values, uint8_t *restrict codes, float *scale,
                        size_t count, const uint32_t *restrict borders,
                        const uint8_t *restrict nearby, int is_signed) {
    uint32_t bits[BLOCK], most = 0;
    float shares[BLOCK];
    uint8_t found[BLOCK];
    memcpy(bits, values, sizeof *bits * count);
    // floats without a sign are in the order of their bits, and what is no number is the largest
    for (size_t i = 0; i < count; i++) {
        uint32_t size = bits[i] & 0x7FFFFFFFu;
        most = size > most ? size : most;
    }
    memcpy(scale, &most, sizeof most);
    float divisor = *scale < 0x1p-126f ? 0x1p-126f : *scale;
    for (size_t i = 0; i < count; i++) shares[i] = fabsf(values[i]) / divisor;
    memcpy(bits, shares, sizeof *bits * count);
    for (size_t i = 0; i < count; i++) {
        uint32_t first = bits[i] >> 16;
        uint8_t code = nearby[first < NEARBY ? first : NEARBY];
        found[i] = code + (borders[code] < bits[i]);
    }
    if (is_signed)
        for (size_t i = 0; i < count; i++)
            codes[i] = values[i] < 0.0f ? -found[i] : found[i];
    else
        for (size_t i = 0; i < count; i++)
            codes[i] = found[i] | ((found[i] == 0) & (values[i] > 0.0f));
}

void store(const float *values, uint8_t *codes, float *scales, size_t count, const uint32_t *borders,
           const uint8_t *nearby, int is_signed) {
    for (size_t at = 0; at < count; at += BLOCK)
        store_block(values + at, codes + at, scales + at / BLOCK, length(count, at), borders,
                    nearby, is_signed);
}

// `levels` has the value of every byte, negative codes included.
void load(float *restrict values, const uint8_t *restrict codes, const float *restrict scales,
          size_t count, const float *restrict levels) {
    for (size_t at = 0; at < count; at += BLOCK)
        for (size_t i = at; i < at + length(count, at); i++)
            values[i] = levels[codes[i]] * scales[at / BLOCK];
}

// Roots in place, rounded once; the one of torch's libraries may miss by a unit in the last place.
void roots(float *values, size_t count) {
    for (size_t i = 0; i < count; i++) values[i] = sqrtf(values[i]);
}
