/* Attention over a paged cache: every row of a batch reads the blocks of its sequence.

   PyTorch would first copy the keys and values of every row into a padded rectangle, and then read
   them there. Here they are read where they lie, once for all query heads that share them. Scores
   are never held for more than SEGMENT positions: the softmax is the online one of attention.py.
   Numbers come and go in float32 or in bfloat16, its upper half; everything between is float32.

   Nothing in the order of the sums depends on the other rows: a row gets the same bits alone and in
   any batch. Vectors are those of GCC and clang, as wide as a register of the CPU at hand; D is a
   multiple of 16. Threads share out the pairs of a row and a key/value head. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* LANES: floats in a register. LOW and HIGH: the lower halves of two registers, one number of each
   in turn, and the upper halves. */
#if defined __AVX512F__
#define LANES 16
#define LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined __AVX__
#define LANES 8
#define LOW 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define LANES 4
#define LOW 0, 4, 1, 5
#define HIGH 2, 6, 3, 7
#endif
#define ALIGNED __attribute__((aligned(64))) /* no vector across two cache lines */
#define SEGMENT 256 /* positions whose scores are held at once; a multiple of LANES */

typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

static inline Floats load(const float *from) { return *(const Floats *)from; }

/* to = `count` numbers of `size` bytes: 4, float32, or 2, bfloat16, which 16 zero bits complete. */
static inline void widen(const void *from, int size, float *to, int count) {
    for (int i = 0; i < count; i += LANES)
        if (size == 4)
            *(Floats *)(to + i) = load((const float *)from + i);
        else {
            Halves halves = *(const Halves *)((const uint16_t *)from + i);
            *(Ints *)(to + i) = __builtin_convertvector(halves, Ints) << 16;
        }
}

/* The way back: to the nearest, of two as near the even one. NaN is set apart, since a carry could
   make -0 of it. */
static inline void narrow(const float *from, int size, void *to, int count) {
    for (int i = 0; i < count; i++)
        if (size == 4)
            ((float *)to)[i] = from[i];
        else {
            uint32_t bits;
            memcpy(&bits, from + i, 4);
            uint16_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
            ((uint16_t *)to)[i] = isnan(from[i]) ? 0x7fc0 : nearest;
        }
}

/* e^x to 1e-7 of itself: e^x = 2^n·e^r with n = round(x / ln 2), so |r| < 0.35, and Taylor's series
   of e^r up to r^7 leaves out 0.35^8/8! = 6e-9. Adding 1.5·2^23 rounds to an integer, which then
   lies in the lowest bits. 0 below -87, where 2^n ends; x is at most 0. NaN stays NaN. */
static inline Floats exponential(Floats x) {
    const float round = 12582912.0f;
    Floats shifted = x * 1.44269504f + round, n = shifted - round;
    Floats r = x - n * 0.693145752f - n * 1.42860677e-6f; /* ln 2 in two parts: n times the first
                                                             is exact */
    Floats sum = 1 / 120.0f + r * (1 / 720.0f + r * (1 / 5040.0f));
    sum = 1 + r * (1 + r * (1 / 2.0f + r * (1 / 6.0f + r * (1 / 24.0f + r * sum))));
    Floats power = (Floats)(((Ints)shifted + 127) << 23);
    return (Floats)((Ints)(sum * power) & ~(x < -87.0f));
}

static inline float sum_of(Floats x) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] += x[i + half];
    return x[0];
}

/* a's halves added up in the even lanes, b's in the odd ones. */
static inline Floats fold(Floats a, Floats b) {
    return __builtin_shufflevector(a, b, LOW) + __builtin_shufflevector(a, b, HIGH);
}

/* LANES positions of a cache as float32: where they lie, or in `room` [LANES, D], where they are
   converted once for all query heads. slot: where they lie, in numbers from `cache`; then in floats
   from what is returned. */
static inline const float *rows_at(const void *cache, int size, const size_t **slot,
                                   const size_t *slot_in_room, float *room, int D) {
    if (size == 4) return cache;
    for (int i = 0; i < LANES; i++)
        widen((const uint16_t *)cache + (*slot)[i], size, room + i * D, D);
    *slot = slot_in_room;
    return room;
}

/* The products of q with the keys of LANES positions. slot: where they lie, in floats. */
static inline Floats scores_of(const float *q, const float *keys, const size_t *slot, int D) {
    Floats sums[LANES];
#pragma GCC unroll 4
    for (int i = 0; i < LANES; i += 4) {
        const float *k0 = keys + slot[i], *k1 = keys + slot[i + 1];
        const float *k2 = keys + slot[i + 2], *k3 = keys + slot[i + 3];
        Floats s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
        for (int d = 0; d < D; d += LANES) {
            Floats part = load(q + d);
            s0 += part * load(k0 + d);
            s1 += part * load(k1 + d);
            s2 += part * load(k2 + d);
            s3 += part * load(k3 + d);
        }
        sums[i] = s0, sums[i + 1] = s1, sums[i + 2] = s2, sums[i + 3] = s3;
    }
    /* LANES registers of LANES sums each: folded together, they are one, lane i for position i. */
#pragma GCC unroll 4
    for (int half = LANES / 2; half; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; i++) sums[i] = fold(sums[i], sums[i + half]);
    return sums[0];
}

/* out += the values of LANES positions, weighted: four registers of each value, or one. */
static inline void add_four(float *out, const float *weight, const float *values,
                            const size_t *slot) {
    Floats s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
        const float *value = values + slot[i];
        s0 += weight[i] * load(value);
        s1 += weight[i] * load(value + LANES);
        s2 += weight[i] * load(value + 2 * LANES);
        s3 += weight[i] * load(value + 3 * LANES);
    }
    Floats *to = (Floats *)out;
    to[0] += s0, to[1] += s1, to[2] += s2, to[3] += s3;
}

static inline void add_one(float *out, const float *weight, const float *values,
                           const size_t *slot) {
    Floats sum = {0};
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) sum += weight[i] * load(values + slot[i]);
    *(Floats *)out += sum;
}

static inline void add_values(float *out, const float *weight, const float *values,
                              const size_t *slot, int D) {
    int d = 0;
    for (; d + 4 * LANES <= D; d += 4 * LANES) add_four(out + d, weight, values + d, slot);
    for (; d < D; d += LANES) add_one(out + d, weight, values + d, slot);
}

/* Scores become weights e^(score - largest); what was added up so far shrinks to the new largest.
   Scores behind the last position, up to a multiple of LANES, are -infinity: they weigh 0. */
static void softmax_step(float *scores, int padded, float *largest, float *total, float *out,
                         int D) {
    Floats sum = {0}, difference = {0};
    float now = *largest;
#pragma omp simd reduction(max : now)
    for (int i = 0; i < padded; i++) now = scores[i] > now ? scores[i] : now;
    for (int i = 0; i < padded; i += LANES) {
        Floats weight = exponential(load(scores + i) - now);
        *(Floats *)(scores + i) = weight;
        sum += weight;
    }
    difference[0] = *largest - now;
    float shrink = exponential(difference)[0];
    *total = *total * shrink + sum_of(sum);
    *largest = now;
    for (int d = 0; d < D; d += LANES) *(Floats *)(out + d) *= shrink;
}

/* Where positions start ... start+count-1 of a sequence lie, in numbers, and then the last one
   again, up to a multiple of LANES. step: numbers of a position. -> how many that are. */
static int find_slots(const int32_t *table, int block_size, size_t step, int start, int count,
                      size_t *slot) {
    int inside = start % block_size, i = 0;
    for (int block = start / block_size; i < count; block++, inside = 0) {
        size_t first = ((size_t)table[block] * block_size + inside) * step;
        int left = block_size - inside, end = left < count - i ? i + left : count;
        for (; i < end; i++, first += step) slot[i] = first;
    }
    for (; i % LANES; i++) slot[i] = slot[i - 1];
    return i;
}

/* Ask for what is needed next, so that it comes while this is computed. The hardware guesses right
   within a block only. */
static inline void prefetch(const char *cache, int size, const size_t *slot, int D) {
    for (int i = 0; i < LANES; i++)
        for (int byte = 0; byte < D * size; byte += 64)
            __builtin_prefetch(cache + slot[i] * size + byte);
}

/* One row and one key/value head: G query heads, q and out [G, D]. is_cold: the keys and values
   come from memory, since no row before this one has just read them. Inlined, so that `size` is
   known to the compiler: no branch on it is left. */
static inline __attribute__((always_inline)) void
attend(const char *q, const char *keys, const char *values, const int32_t *table, char *out,
       int context_len, int G, int K, int D, int block_size, int size, int is_cold) {
    float scores[G][SEGMENT] ALIGNED, queries[G * D] ALIGNED, sums[G * D] ALIGNED;
    float room[LANES * D] ALIGNED, largest[G], total[G], scale = 1 / sqrtf(D);
    size_t slot[SEGMENT], slot_in_room[LANES];
    for (int i = 0; i < LANES; i++) slot_in_room[i] = (size_t)i * D;
    for (int g = 0; g < G; g++) largest[g] = -INFINITY, total[g] = 0;
    for (int i = 0; i < G * D; i++) sums[i] = 0;
    widen(q, size, queries, G * D);
    for (int start = 0; start < context_len; start += SEGMENT) {
        int left = context_len - start, count = left < SEGMENT ? left : SEGMENT;
        int padded = find_slots(table, block_size, (size_t)K * D, start, count, slot);
        for (int i = 0, next = LANES; i < padded; i = next, next += LANES) {
            if (is_cold && next < padded) prefetch(keys, size, slot + next, D);
            if (is_cold && next == padded) prefetch(values, size, slot, D);
            const size_t *at = slot + i;
            const float *rows = rows_at(keys, size, &at, slot_in_room, room, D);
            for (int g = 0; g < G; g++)
                *(Floats *)(scores[g] + i) = scores_of(queries + g * D, rows, at, D) * scale;
        }
        for (int g = 0; g < G; g++) {
            for (int i = count; i < padded; i++) scores[g][i] = -INFINITY;
            softmax_step(scores[g], padded, largest + g, total + g, sums + g * D, D);
        }
        for (int i = 0, next = LANES; i < padded; i = next, next += LANES) {
            if (is_cold && next < padded) prefetch(values, size, slot + next, D);
            const size_t *at = slot + i;
            const float *rows = rows_at(values, size, &at, slot_in_room, room, D);
            for (int g = 0; g < G; g++) add_values(sums + g * D, scores[g] + i, rows, at, D);
        }
    }
    for (int g = 0; g < G; g++)
        for (int d = 0; d < D; d++) sums[g * D + d] /= total[g];
    narrow(sums, size, out, G * D);
}

/* q [N, H, D], its rows `stride` numbers apart; keys and values [blocks, block_size, K, D];
   tables [sequences, W]; table_of_row and context_lens [N]; out [N, H, D]. A number of q, keys,
   values and out has SIZE bytes. */
#define PAGED_ATTENTION(NAME, SIZE)                                                               \
    void NAME(const char *q, const char *keys, const char *values, const int32_t *tables,         \
              const int32_t *table_of_row, const int32_t *context_lens, char *out, int N, int H,  \
              int K, int D, int block_size, int W, int stride) {                                  \
        int G = H / K, head = D * SIZE; /* bytes of a head */                                     \
        _Pragma("omp parallel for collapse(2) schedule(dynamic)")                                 \
        for (int n = 0; n < N; n++)                                                               \
            for (int k = 0; k < K; k++) {                                                         \
                int is_cold = n == 0 || table_of_row[n] != table_of_row[n - 1];                   \
                attend(q + (size_t)n * stride * SIZE + k * G * head, keys + k * head,             \
                       values + k * head, tables + (size_t)table_of_row[n] * W,                   \
                       out + ((size_t)n * H + k * G) * head, context_lens[n], G, K, D,            \
                       block_size, SIZE, is_cold);                                                \
            }                                                                                     \
    }

PAGED_ATTENTION(paged_attention_float32, 4)
PAGED_ATTENTION(paged_attention_bfloat16, 2)
