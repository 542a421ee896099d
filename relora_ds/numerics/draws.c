// The draws of `Stream.uniform` and `Stream.normal`, bit for bit, for CPUs.
//
// Every step is one that IEEE 754 defines exactly: integers, sums, products, quotients, roots. No
// two of them may be fused, and none may come from the mathematical library.
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { BLOCK = 256 };

static inline uint64_t finalise(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

static void hash(uint64_t *restrict words, uint64_t first, uint64_t first_key,
                 uint64_t second_key) {
    for (size_t i = 0; i < BLOCK; i++)
        words[i] = finalise(finalise((first + i) * 0x9E3779B97F4A7C15u + first_key) ^ second_key);
}

static inline double as_double(uint64_t bits) {
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint64_t as_bits(double value) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

// An integer below 2**52, exactly: it is the mantissa of 2**52 plus itself.
static inline double from_integer(uint64_t x) {
    return as_double(x | 0x4330000000000000u) - 4503599627370496.0;
}

// Logarithm of a positive normal number below one; `_log` in randomness.py.
static inline double logarithm(double x) {
    uint64_t bits = as_bits(x) + (0x3FF0000000000000u - 0x3FE6A09E00000000u);
    double k = from_integer(bits >> 52) - 1023.0;
    double f = as_double((bits & 0x000FFFFFFFFFFFFFu) + 0x3FE6A09E00000000u) - 1.0;
    double half_square = f * f * 0.5;
    double s = f / (f + 2.0);
    double z = s * s, w = z * z;
    double even = w * (w * (w * 1.531383769920937332e-01 + 2.222219843214978396e-01)
                       + 3.999999999940941908e-01);
    double odd = z * (w * (w * (w * 1.479819860511658591e-01 + 1.818357216161805012e-01)
                           + 2.857142874366239149e-01) + 6.666666666666735130e-01);
    double sum = s * (half_square + (even + odd));
    return k * 1.90821492927058770002e-10 + sum - half_square + f + k * 6.93147180369123816490e-01;
}

// Cosine of 2 pi (turn + 1/2) / 2**32; `_cosine` in randomness.py.
static inline double cosine(uint64_t turn) {
    uint64_t quarter = (turn + (1u << 29)) >> 30;
    double angle = (from_integer(turn) + 0.5) * (6.283185307179586 / 4294967296.0);
    double n = from_integer(quarter);
    double y = angle - n * 1.57079632673412561417e+00 - n * 6.07710050650619224932e-11;
    double z = y * y, w = z * z;
    double c = z * (z * (z * 2.48015872894767294178e-05 + -1.38888888888741095749e-03)
                    + 4.16666666666666019037e-02)
             + w * w * (z * (z * -1.13596475577881948265e-11 + 2.08757232129817482790e-09)
                        + -2.75573143513906633035e-07);
    double half = z * 0.5, rest = 1.0 - half;
    c = rest + (1.0 - rest - half + z * c);
    double s = z * (z * 2.75573137070700676789e-06 + -1.98412698298579493134e-04)
             + z * w * (z * 1.58969099521155010221e-10 + -2.50507602534068634195e-08)
             + 8.33333333332248946124e-03;
    s = z * y * (z * s + -1.66666666666666324348e-01) + y;
    // quarters 1 and 3 have the sine, 1 and 2 the sign
    uint64_t chosen = quarter & 1 ? as_bits(s) : as_bits(c);
    return as_double(chosen ^ ((quarter + 1) & 2) << 62);
}

void draw_uniform(float *restrict out, size_t count, uint64_t first, uint64_t first_key,
                  uint64_t second_key) {
    for (size_t at = 0; at < count; at += BLOCK) {
        uint64_t words[BLOCK];
        float values[BLOCK];
        hash(words, first + at, first_key, second_key);
        for (size_t i = 0; i < BLOCK; i++)
            values[i] = (float)(int32_t)(words[i] >> 40) * 5.9604644775390625e-08f;
        size_t left = count - at < BLOCK ? count - at : BLOCK;
        memcpy(out + at, values, left * sizeof *out);
    }
}

void draw_normal(float *restrict out, size_t count, uint64_t first, uint64_t first_key,
                 uint64_t second_key) {
    for (size_t at = 0; at < count; at += BLOCK) {
        uint64_t words[BLOCK];
        float values[BLOCK];
        hash(words, first + at, first_key, second_key);
        for (size_t i = 0; i < BLOCK; i++) {
            double uniform = (from_integer(words[i] >> 32) + 0.5) * (1.0 / 4294967296.0);
            double radius = sqrt(logarithm(uniform) * -2.0);
            values[i] = (float)(radius * cosine(words[i] & 0xFFFFFFFFu));
        }
        size_t left = count - at < BLOCK ? count - at : BLOCK;
        memcpy(out + at, values, left * sizeof *out);
    }
}
