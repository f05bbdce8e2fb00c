/* Products with matrices of 4 and 8 bits, for CPUs with AVX-512 VNNI (x86-64 since 2019).

   One token is bound by the bytes of the weights, so the weights stay as they are until they are in
   a register. Many tokens are bound by arithmetic, so what has come into a register meets all of
   them before it is given up.

   The instruction that multiplies, vpdpbusd, has 16 lanes and adds four products of bytes to each:
   unsigned bytes, which are the weights, times signed ones, the activations. A lane is a row of the
   matrix. 16 rows are a block and stand in memory in the order in which they are read, so that
   eight registers hold 32 columns of a block:

       w[0]   row 0: columns 0 1 2 3     row 1: columns 0 1 2 3     ...   row 15: columns 0 1 2 3
       w[1]   row 0: columns 4 5 6 7     row 1: columns 4 5 6 7     ...   row 15: columns 4 5 6 7
       ...                                                          w[7]  row 15: columns 28 ... 31

   A token passes by in eight steps, with four of its activations, which all lanes get, in each.
   Nothing is ever added up across lanes. The sums of every token are added up in the same order,
   whichever tokens are beside it: a result is the same, to the last bit, alone and in any batch.

   x is [N, K], y is [N, R], both float32; K is a multiple of 32. Matrices are filled up to whole
   blocks of rows. Threads share out the blocks. */

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#ifndef __AVX512VNNI__
#error "this kernel needs AVX-512 VNNI"
#endif

#define GROUP 32      /* columns that eight registers hold, and that share scales */
#define ROWS 16       /* of a block */
#define TOKENS 128    /* that pass by together: their sums, 8 KB, stay in the first cache */
#define LARGEST 32512 /* 127·256: high and low fit in signed bytes */

static int at_most(int limit, int number) { return number < limit ? number : limit; }

static inline __m512i four_for_all_lanes(int32_t four) { return _mm512_set1_epi32(four); }

static inline void store_rows(float *y, __m512 sums, int rows) {
    _mm512_mask_storeu_ps(y, rows >= ROWS ? 0xffff : (1 << rows) - 1, sums);
}

/* ── Activations of 16 bits ──────────────────────────────────────────────────────────────────────

   An activation becomes two signed bytes: 256·high + low, a 16-bit integer with a scale for every
   32 of them. What that loses is 1/65000 of the largest of the 32, a hundredth of what bfloat16
   loses. Sums within a group are exact integers; groups are added up in float32. */

typedef struct {
    int32_t high[8], low[8]; /* 32 bytes each, four to a number */
    float scale, sum;        /* sum: of the integers */
} Group;

static void quantize_group(const float *x, Group *to) {
    __m512 a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + 16);
    float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b)));
    if (_mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q) | _mm512_cmp_ps_mask(b, b, _CMP_UNORD_Q))
        largest = NAN; /* which max does not see: it must not be lost */
    __m512 inverse = _mm512_set1_ps(largest < 1e-30f ? 0 : LARGEST / largest);
    __m512i half = _mm512_set1_epi32(128), sums = _mm512_setzero_si512();
    for (int i = 0; i < 2; i++) {
        __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(i ? b : a, inverse));
        __m512i high = _mm512_srai_epi32(_mm512_add_epi32(q, half), 8); /* low is -128 ... 127 */
        __m512i low = _mm512_sub_epi32(q, _mm512_slli_epi32(high, 8));
        sums = _mm512_add_epi32(sums, q);
        _mm_storeu_si128((__m128i *)(to->high + 4 * i), _mm512_cvtepi32_epi8(high));
        _mm_storeu_si128((__m128i *)(to->low + 4 * i), _mm512_cvtepi32_epi8(low));
    }
    to->scale = largest / LARGEST;
    to->sum = _mm512_reduce_add_epi32(sums);
}

/* -> [K/32][N]: the groups that meet the same eight registers stand together. */
static void quantize_tokens(const float *x, Group *to, int N, int K) {
#pragma omp parallel for schedule(static) if (N > 1)
    for (int n = 0; n < N; n++)
        for (int g = 0; g < K / GROUP; g++)
            quantize_group(x + (size_t)n * K + g * GROUP, to + (size_t)g * N + n);
}

/* Add scale_x·(scale·(q_x·w) + minimum·Σ q_x) to the sums of a few tokens. The multiplications of
   one token wait for each other, five cycles each; those of another do not, so they take turns. */
static inline __attribute__((always_inline)) void add_group(
        const __m512i w[8], __m512 scale, __m512 minimum, const Group *x, __m512 *sums,
        const int tokens) {
    __m512i high[8], low[8];
    for (int n = 0; n < tokens; n++) high[n] = low[n] = _mm512_setzero_si512();
    for (int i = 0; i < 8; i++)
        for (int n = 0; n < tokens; n++) {
            high[n] = _mm512_dpbusd_epi32(high[n], w[i], four_for_all_lanes(x[n].high[i]));
            low[n] = _mm512_dpbusd_epi32(low[n], w[i], four_for_all_lanes(x[n].low[i]));
        }
    for (int n = 0; n < tokens; n++) {
        __m512 product = _mm512_cvtepi32_ps(
            _mm512_add_epi32(_mm512_slli_epi32(high[n], 8), low[n]));
        __m512 offset = _mm512_mul_ps(minimum, _mm512_set1_ps(x[n].sum));
        sums[n] = _mm512_fmadd_ps(_mm512_fmadd_ps(product, scale, offset),
                                  _mm512_set1_ps(x[n].scale), sums[n]);
    }
}

/* A group of all tokens: by eights, with which the 32 registers are full, and what remains. */
static inline void add_group_of_all(const __m512i w[8], __m512 scale, __m512 minimum,
                                    const Group *x, __m512 *sums, int N) {
    int n = 0;
    for (; n + 8 <= N; n += 8) add_group(w, scale, minimum, x + n, sums + n, 8);
    for (; n + 4 <= N; n += 4) add_group(w, scale, minimum, x + n, sums + n, 4);
    for (; n < N; n++) add_group(w, scale, minimum, x + n, sums + n, 1);
}

/* ── Matrices ──────────────────────────────────────────────────────────────────────────────────── */

/* 256 bytes -> 512 weights: a byte of 16 rows' columns 0-3 holds their columns 4-7 as well. */
static inline void int4_weights(const uint8_t *packed, __m512i w[8]) {
    __m512i mask = _mm512_set1_epi8(15);
    for (int i = 0; i < 4; i++) {
        __m512i both = _mm512_loadu_si512(packed + 64 * i);
        w[2 * i] = _mm512_and_si512(both, mask);
        w[2 * i + 1] = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
    }
}

/* 512 bytes. They hold q + 128, which is unsigned; a minimum of -128·scale takes it off again. */
static inline void int8_weights(const uint8_t *q, __m512i w[8]) {
    for (int i = 0; i < 8; i++) w[i] = _mm512_loadu_si512(q + 64 * i);
}

static inline __m512 float16s(const uint16_t *from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
}

static inline __m512 int8_minimum(__m512 scale) {
    return _mm512_mul_ps(scale, _mm512_set1_ps(-128));
}

typedef struct {
    const uint8_t *q;                /* [R/16, K/32, 256 or 512] */
    const uint16_t *scale, *minimum; /* [R/16, K/32, 16] float16 */
    const float *row_scale;          /* [R/16, 16] */
} Matrix;

/* The sums of all tokens for a block of rows. x: [groups][N] */
typedef void Multiply(const Matrix *, int block, const Group *x, __m512 *sums, int N, int groups);

static void int4_block(const Matrix *matrix, int block, const Group *x, __m512 *sums, int N,
                       int groups) {
    for (int g = 0; g < groups; g++) {
        size_t at = (size_t)block * groups + g;
        __m512i w[8];
        int4_weights(matrix->q + 256 * at, w);
        add_group_of_all(w, float16s(matrix->scale + ROWS * at),
                         float16s(matrix->minimum + ROWS * at), x + (size_t)g * N, sums, N);
    }
}

static void int8_group_block(const Matrix *matrix, int block, const Group *x, __m512 *sums, int N,
                             int groups) {
    for (int g = 0; g < groups; g++) {
        size_t at = (size_t)block * groups + g;
        __m512 scale = float16s(matrix->scale + ROWS * at);
        __m512i w[8];
        int8_weights(matrix->q + 512 * at, w);
        add_group_of_all(w, scale, int8_minimum(scale), x + (size_t)g * N, sums, N);
    }
}

static void int8_block(const Matrix *matrix, int block, const Group *x, __m512 *sums, int N,
                       int groups) {
    __m512 scale = _mm512_loadu_ps(matrix->row_scale + ROWS * block);
    for (int g = 0; g < groups; g++) {
        __m512i w[8];
        int8_weights(matrix->q + 512 * ((size_t)block * groups + g), w);
        add_group_of_all(w, scale, int8_minimum(scale), x + (size_t)g * N, sums, N);
    }
}

static void matmul(Multiply *multiply, const Matrix *matrix, const float *x, float *y, int N, int K,
                   int R) {
    int groups = K / GROUP;
    Group *q_x = malloc(sizeof(Group) * groups * at_most(TOKENS, N));
    for (int first = 0; first < N; first += TOKENS) {
        int count = at_most(TOKENS, N - first);
        quantize_tokens(x + (size_t)first * K, q_x, count, K);
#pragma omp parallel for schedule(static)
        for (int r = 0; r < R; r += ROWS) {
            __m512 sums[TOKENS];
            for (int n = 0; n < count; n++) sums[n] = _mm512_setzero_ps();
            multiply(matrix, r / ROWS, q_x, sums, count, groups);
            for (int n = 0; n < count; n++)
                store_rows(y + (size_t)(first + n) * R + r, sums[n], R - r);
        }
    }
    free(q_x);
}

void int4_matmul(const float *x, const uint8_t *packed, const uint16_t *scale,
                 const uint16_t *minimum, float *y, int N, int K, int R) {
    Matrix matrix = {.q = packed, .scale = scale, .minimum = minimum};
    matmul(int4_block, &matrix, x, y, N, K, R);
}

/* As GGUF's Q8_0 has them: a scale for every 32 of a row. */
void int8_group_matmul(const float *x, const uint8_t *q, const uint16_t *scale, float *y, int N,
                       int K, int R) {
    Matrix matrix = {.q = q, .scale = scale};
    matmul(int8_group_block, &matrix, x, y, N, K, R);
}

void int8_matmul(const float *x, const uint8_t *q, const float *scale, float *y, int N, int K,
                 int R) {
    Matrix matrix = {.q = q, .row_scale = scale};
    matmul(int8_block, &matrix, x, y, N, K, R);
}

/* ── W8A8 ────────────────────────────────────────────────────────────────────────────────────────

   x is quantized to signed bytes, with one scale a token, and the whole sum is an integer. */

/* -> q_x [K/32][N][8], four bytes to a number; 128 too much a weight is -128·Σ q_x at the start. */
static void quantize_to_bytes(const float *x, int32_t *q_x, float *scale, int32_t *start, int N,
                              int K) {
#pragma omp parallel for schedule(static) if (N > 1)
    for (int n = 0; n < N; n++) {
        const float *token = x + (size_t)n * K;
        __m512 largest = _mm512_setzero_ps();
        __mmask16 not_a_number = 0;
        for (int k = 0; k < K; k += 16) {
            __m512 some = _mm512_loadu_ps(token + k);
            largest = _mm512_max_ps(largest, _mm512_abs_ps(some));
            not_a_number |= _mm512_cmp_ps_mask(some, some, _CMP_UNORD_Q);
        }
        float most = not_a_number ? NAN : _mm512_reduce_max_ps(largest);
        scale[n] = most < 1e-30f ? 1 : most / 127;
        __m512i sums = _mm512_setzero_si512();
        for (int k = 0; k < K; k += 16) {
            __m512i q = _mm512_cvtps_epi32(
                _mm512_div_ps(_mm512_loadu_ps(token + k), _mm512_set1_ps(scale[n])));
            int32_t *to = q_x + 8 * ((size_t)(k / GROUP) * N + n) + k % GROUP / 4;
            _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8(q));
            sums = _mm512_add_epi32(sums, q);
        }
        start[n] = -128 * _mm512_reduce_add_epi32(sums);
    }
}

static inline __attribute__((always_inline)) void add_bytes(const __m512i w[8], const int32_t *x,
                                                            __m512i *sums, const int tokens) {
    __m512i sum[8];
    for (int n = 0; n < tokens; n++) sum[n] = sums[n];
    for (int i = 0; i < 8; i++)
        for (int n = 0; n < tokens; n++)
            sum[n] = _mm512_dpbusd_epi32(sum[n], w[i], four_for_all_lanes(x[8 * n + i]));
    for (int n = 0; n < tokens; n++) sums[n] = sum[n];
}

static void w8a8_block(const uint8_t *q, const int32_t *x, __m512i *sums, int N, int groups) {
    for (int g = 0; g < groups; g++, x += 8 * N) {
        __m512i w[8];
        int8_weights(q + 512 * (size_t)g, w);
        int n = 0;
        for (; n + 8 <= N; n += 8) add_bytes(w, x + 8 * n, sums + n, 8);
        for (; n + 4 <= N; n += 4) add_bytes(w, x + 8 * n, sums + n, 4);
        for (; n < N; n++) add_bytes(w, x + 8 * n, sums + n, 1);
    }
}

void w8a8_matmul(const float *x, const uint8_t *q, const float *scale, float *y, int N, int K,
                 int R) {
    int32_t *q_x = malloc((size_t)at_most(TOKENS, N) * K), start[TOKENS];
    float scale_x[TOKENS];
    for (int first = 0; first < N; first += TOKENS) {
        int count = at_most(TOKENS, N - first);
        quantize_to_bytes(x + (size_t)first * K, q_x, scale_x, start, count, K);
#pragma omp parallel for schedule(static)
        for (int r = 0; r < R; r += ROWS) {
            __m512i sums[TOKENS];
            for (int n = 0; n < count; n++) sums[n] = _mm512_set1_epi32(start[n]);
            w8a8_block(q + (size_t)r * K, q_x, sums, count, K / GROUP);
            for (int n = 0; n < count; n++) {
                __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[n]),
                                              _mm512_set1_ps(scale_x[n]));
                store_rows(y + (size_t)(first + n) * R + r,
                           _mm512_mul_ps(scaled, _mm512_loadu_ps(scale + r)), R - r);
            }
        }
    }
    free(q_x);
}
