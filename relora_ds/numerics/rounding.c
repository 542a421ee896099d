// Stochastic rounding of fp32 to bf16, with the draws of `Stream.shorts`, for CPUs.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { WORDS = 256, PER_WORD = 4 };

static inline uint64_t finalise(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

// Element i of `out` takes the draw number PER_WORD * word + i; a word's lowest bits come first.
void round_at_random(const uint32_t *restrict values, uint16_t *restrict out, size_t count,
                     uint64_t word, uint64_t first_key, uint64_t second_key) {
    for (size_t at = 0; at < count; at += WORDS * PER_WORD, word += WORDS) {
        uint64_t words[WORDS];
        uint16_t draws[WORDS * PER_WORD];
        for (size_t i = 0; i < WORDS; i++)
            words[i] = finalise(finalise((word + i) * 0x9E3779B97F4A7C15u + first_key) ^ second_key);
        memcpy(draws, words, sizeof words);  // little-endian, as torch's view of the same words
        size_t left = count - at < WORDS * PER_WORD ? count - at : WORDS * PER_WORD;
        for (size_t i = 0; i < left; i++) {
            uint32_t bits = values[at + i];
            // nothing is above the largest bf16: what is larger stays below infinity
            uint32_t draw = (bits & 0x7FFFFFFFu) < 0x7F7F0000u ? draws[i] : 0;
            out[at + i] = (bits + draw) >> 16;
        }
    }
}
