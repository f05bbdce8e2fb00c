/* The small steps between the matrix products, in float32.

   Each is a handful of PyTorch operations, and each of these costs a microsecond or two before it
   computes anything; for one token's 576 numbers the computing is a tenth of that. For many tokens
   it is the memory that counts: six operations read and write it six times. Here a step is one call
   and one pass. A token's result does not depend on the tokens beside it, to the last bit. */

#include <math.h>
#include <stddef.h>

#define FEW 64 /* tokens: to wake other threads would take longer than to do without them */

/* norm.py: x and y are [N, C], weight is [C]. */
void rms_norm(const float *x, const float *weight, float eps, float *y, int N, int C) {
#pragma omp parallel for if (N > FEW)
    for (int n = 0; n < N; n++) {
        const float *from = x + (size_t)n * C;
        float *to = y + (size_t)n * C, sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int c = 0; c < C; c++) sum += from[c] * from[c];
        float scale = 1 / sqrtf(sum / C + eps);
#pragma omp simd
        for (int c = 0; c < C; c++) to[c] = from[c] * scale * weight[c];
    }
}

/* rope.py: x is [N, H, D], its rows `stride` numbers apart; cos and sin are [N, D/2]. */
void rope(const float *x, const float *cos, const float *sin, float *y, int N, int H, int D,
          int stride) {
    int half = D / 2;
#pragma omp parallel for if (N > FEW)
    for (int n = 0; n < N; n++)
        for (int h = 0; h < H; h++) {
            const float *from = x + (size_t)n * stride + h * D;
            float *to = y + ((size_t)n * H + h) * D;
#pragma omp simd
            for (int i = 0; i < half; i++) {
                float a = from[i], b = from[i + half];
                float c = cos[(size_t)n * half + i], s = sin[(size_t)n * half + i];
                to[i] = a * c - b * s;
                to[i + half] = b * c + a * s;
            }
        }
}
