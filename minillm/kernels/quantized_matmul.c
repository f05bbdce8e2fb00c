/* Products with matrices of 4 and 8 bits, for CPUs with AVX-512 VNNI (x86-64 since 2019).

   Decoding is bound by the bytes of the weights, so the weights stay as they are until they are in
   a register. The instruction that then multiplies 64 pairs of bytes, vpdpbusd, wants unsigned
   bytes on one side, which are the weights, and signed ones on the other. An activation becomes two
   of these: 256·high + low, a 16-bit integer with a scale for every 32 activations. What that loses
   is 1/65000 of the largest of the 32, a hundredth of what bfloat16 loses. Sums within a group are
   exact integers; groups are added up in float32.

   x is [N, K], y is [N, R], both float32; K is a multiple of 64. Threads share out the rows. */

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#ifndef __AVX512VNNI__
#error "this kernel needs AVX-512 VNNI"
#endif

#define GROUP 32    /* activations, and weights, that share a scale */
#define LARGEST 32512 /* 127·256: high and low fit in signed bytes */

/* Sixteen groups of one token's activations: 8 registers of 64 bytes, and their scales and sums.
   1152 bytes, a multiple of 64, as aligned_alloc wants it; K, which is one too, as well. */
typedef struct {
    int8_t high[512], low[512];
    float scale[16], sum[16];
} Sixteen;

static int sixteens(int K) { return (K + 511) / 512; }

static void quantize_group(const float *x, Sixteen *to, int g) {
    __m512 a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + 16);
    float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b)));
    if (_mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q) | _mm512_cmp_ps_mask(b, b, _CMP_UNORD_Q))
        largest = NAN; /* which max does not see: it must not be lost */
    __m512 inverse = _mm512_set1_ps(largest > 0 ? LARGEST / largest : 0);
    __m512i half = _mm512_set1_epi32(128), sums = _mm512_setzero_si512();
    for (int i = 0; i < 2; i++) {
        __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(i ? b : a, inverse));
        __m512i high = _mm512_srai_epi32(_mm512_add_epi32(q, half), 8); /* low is -128 ... 127 */
        __m512i low = _mm512_sub_epi32(q, _mm512_slli_epi32(high, 8));
        sums = _mm512_add_epi32(sums, q);
        _mm_storeu_si128((__m128i *)(to->high + g * GROUP + 16 * i), _mm512_cvtepi32_epi8(high));
        _mm_storeu_si128((__m128i *)(to->low + g * GROUP + 16 * i), _mm512_cvtepi32_epi8(low));
    }
    to->scale[g] = largest / LARGEST;
    to->sum[g] = to->scale[g] * _mm512_reduce_add_epi32(sums); /* of what x has become */
}

/* -> [N][sixteens(K)], zeros behind the last group. To be freed. */
static Sixteen *quantize_activations(const float *x, int N, int K) {
    int count = sixteens(K);
    Sixteen *all = aligned_alloc(64, sizeof(Sixteen) * N * count);
    for (int n = 0; n < N; n++)
        for (int g = 0; g < 16 * count; g++) {
            Sixteen *to = all + n * count + g / 16;
            static const float zeros[GROUP];
            quantize_group(g * GROUP < K ? x + (size_t)n * K + g * GROUP : zeros, to, g % 16);
        }
    return all;
}

/* 64 weights (unsigned bytes) times 64 activations: 8 sums of the first group, 8 of the second. */
static inline __m512 dot64(__m512i weights, const Sixteen *x, int pair) {
    __m512i sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), weights,
                                       _mm512_loadu_si512(x->high + 64 * pair));
    sums = _mm512_dpbusd_epi32(_mm512_slli_epi32(sums, 8), weights,
                               _mm512_loadu_si512(x->low + 64 * pair));
    return _mm512_cvtepi32_ps(sums);
}

/* Eight times the scale of the pair's first group, eight times that of its second. */
static inline __m512 scales_of(__m512 scales, int pair) {
    __m512i index = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    return _mm512_permutexvar_ps(_mm512_add_epi32(index, _mm512_set1_epi32(2 * pair)), scales);
}

/* 32 bytes: the low halves are the first group, the high halves the second. */
static inline __m512i int4_weights(const uint8_t *packed) {
    __m256i pairs = _mm256_loadu_si256((const __m256i *)packed);
    __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(pairs), _mm256_srli_epi16(pairs, 4), 1);
    return _mm512_and_si512(both, _mm512_set1_epi8(15));
}

/* A signed byte + 128 is an unsigned one: then 128 times the sum of x is too much. */
static inline __m512i int8_weights(const int8_t *q) {
    return _mm512_xor_si512(_mm512_loadu_si512(q), _mm512_set1_epi8(-128));
}

static inline __m512 float16s(const uint16_t *from, int count) {
    __mmask16 there = count >= 16 ? 0xffff : (1 << count) - 1;
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, from));
}

/* packed [R, K/2], a pair of groups in 32 bytes; scale and minimum [R, K/32] float16. */
void int4_matmul(const float *x, const uint8_t *packed, const uint16_t *scale,
                 const uint16_t *minimum, float *y, int N, int K, int R) {
    int groups = K / GROUP, count = sixteens(K);
    Sixteen *all = quantize_activations(x, N, K);
#pragma omp parallel for schedule(static)
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) {
            __m512 sums = _mm512_setzero_ps(), odd_sums = _mm512_setzero_ps();
            for (int s = 0; s < count; s++) {
                const Sixteen *part = all + n * count + s;
                const uint8_t *row = packed + (size_t)r * K / 2 + 256 * s;
                size_t at = (size_t)r * groups + 16 * s;
                int left = groups - 16 * s, pairs = left < 16 ? left / 2 : 8;
                __m512 scales = _mm512_mul_ps(float16s(scale + at, left),
                                              _mm512_load_ps(part->scale));
                sums = _mm512_fmadd_ps(float16s(minimum + at, left), _mm512_load_ps(part->sum),
                                       sums);
                for (int pair = 0; pair < pairs; pair++) {
                    __m512 *to = pair % 2 ? &odd_sums : &sums; /* two do not wait for each other */
                    *to = _mm512_fmadd_ps(dot64(int4_weights(row + 32 * pair), part, pair),
                                          scales_of(scales, pair), *to);
                }
            }
            y[(size_t)n * R + r] = _mm512_reduce_add_ps(_mm512_add_ps(sums, odd_sums));
        }
    free(all);
}

/* q [R, K]; scale [R, K/32] float16, as GGUF's Q8_0 has them. */
void int8_group_matmul(const float *x, const int8_t *q, const uint16_t *scale, float *y, int N,
                       int K, int R) {
    int groups = K / GROUP, count = sixteens(K);
    Sixteen *all = quantize_activations(x, N, K);
#pragma omp parallel for schedule(static)
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) {
            __m512 sums = _mm512_setzero_ps();
            for (int s = 0; s < count; s++) {
                const Sixteen *part = all + n * count + s;
                const int8_t *row = q + (size_t)r * K + 512 * s;
                int left = groups - 16 * s, pairs = left < 16 ? left / 2 : 8;
                __m512 own = float16s(scale + (size_t)r * groups + 16 * s, left);
                __m512 scales = _mm512_mul_ps(own, _mm512_load_ps(part->scale));
                __m512 surplus = _mm512_mul_ps(own, _mm512_set1_ps(-128));
                sums = _mm512_fmadd_ps(surplus, _mm512_load_ps(part->sum), sums);
                for (int pair = 0; pair < pairs; pair++)
                    sums = _mm512_fmadd_ps(dot64(int8_weights(row + 64 * pair), part, pair),
                                           scales_of(scales, pair), sums);
            }
            y[(size_t)n * R + r] = _mm512_reduce_add_ps(sums);
        }
    free(all);
}

/* q [R, K]; scale [R] float32, one for the whole row. */
void int8_matmul(const float *x, const int8_t *q, const float *scale, float *y, int N, int K,
                 int R) {
    int count = sixteens(K), all_pairs = K / 64;
    Sixteen *all = quantize_activations(x, N, K);
#pragma omp parallel for schedule(static)
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) {
            __m512 sums = _mm512_setzero_ps();
            for (int s = 0; s < count; s++) {
                const Sixteen *part = all + n * count + s;
                const int8_t *row = q + (size_t)r * K + 512 * s;
                int left = all_pairs - 8 * s, pairs = left < 8 ? left : 8;
                __m512 scales = _mm512_load_ps(part->scale);
                sums = _mm512_fmadd_ps(_mm512_set1_ps(-128), _mm512_load_ps(part->sum), sums);
                for (int pair = 0; pair < pairs; pair++)
                    sums = _mm512_fmadd_ps(dot64(int8_weights(row + 64 * pair), part, pair),
                                           scales_of(scales, pair), sums);
            }
            y[(size_t)n * R + r] = scale[r] * _mm512_reduce_add_ps(sums);
        }
    free(all);
}

/* W8A8: x is quantized to signed bytes by token, and the whole sum is an integer. */
void w8a8_matmul(const float *x, const int8_t *q, const float *scale, float *y, int N, int K,
                 int R) {
    int8_t *q_x = aligned_alloc(64, (size_t)N * K);
    float *scale_x = malloc(sizeof(float) * N);
    int32_t *sum_x = malloc(sizeof(int32_t) * N);
    for (int n = 0; n < N; n++) {
        const float *row = x + (size_t)n * K;
        __m512 largest = _mm512_setzero_ps();
        __mmask16 not_a_number = 0;
        for (int k = 0; k < K; k += 16) {
            __m512 some = _mm512_loadu_ps(row + k);
            largest = _mm512_max_ps(largest, _mm512_abs_ps(some));
            not_a_number |= _mm512_cmp_ps_mask(some, some, _CMP_UNORD_Q);
        }
        float most = not_a_number ? NAN : _mm512_reduce_max_ps(largest);
        scale_x[n] = most < 1e-30f ? 1 : most / 127;
        __m512i sums = _mm512_setzero_si512();
        for (int k = 0; k < K; k += 16) {
            __m512i q = _mm512_cvtps_epi32(_mm512_div_ps(_mm512_loadu_ps(row + k),
                                                         _mm512_set1_ps(scale_x[n])));
            sums = _mm512_add_epi32(sums, q);
            _mm_storeu_si128((__m128i *)(q_x + (size_t)n * K + k), _mm512_cvtepi32_epi8(q));
        }
        sum_x[n] = _mm512_reduce_add_epi32(sums);
    }
#pragma omp parallel for schedule(static)
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) {
            __m512i sums = _mm512_setzero_si512();
            for (int k = 0; k < K; k += 64)
                sums = _mm512_dpbusd_epi32(sums, int8_weights(q + (size_t)r * K + k),
                                           _mm512_loadu_si512(q_x + (size_t)n * K + k));
            int32_t sum = _mm512_reduce_add_epi32(sums) - 128 * sum_x[n];
            y[(size_t)n * R + r] = (float)sum * scale_x[n] * scale[r];
        }
    free(q_x);
    free(scale_x);
    free(sum_x);
}

/* The matrix in floats, w [R, K]: a long prompt multiplies by it more cheaply than by the bytes. */
void int4_dequantize(const uint8_t *packed, const uint16_t *scale, const uint16_t *minimum,
                     float *w, int K, int R) {
    int groups = K / GROUP;
#pragma omp parallel for schedule(static)
    for (int r = 0; r < R; r++)
        for (int pair = 0; pair < groups / 2; pair++) {
            uint8_t q[64];
            _mm512_storeu_si512(q, int4_weights(packed + (size_t)r * K / 2 + 32 * pair));
            for (int half = 0; half < 2; half++) {
                size_t at = (size_t)r * groups + 2 * pair + half;
                float d = _cvtsh_ss(scale[at]), m = _cvtsh_ss(minimum[at]);
                for (int i = 0; i < GROUP; i++)
                    w[(size_t)r * K + 64 * pair + GROUP * half + i] = d * q[GROUP * half + i] + m;
            }
        }
}
