/* The small steps between the matrix products of a decoded token, in float32.

   Each is a handful of PyTorch operations, and each of these costs a microsecond or two before it
   computes anything; for 576 numbers the computing is a tenth of that. Here a step is one call. */

#include <math.h>
#include <stddef.h>

/* norm.py: x and y are [N, C], weight is [C]. */
void rms_norm(const float *x, const float *weight, float eps, float *y, int N, int C) {
    for (int n = 0; n < N; n++, x += C, y += C) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int c = 0; c < C; c++) sum += x[c] * x[c];
        float scale = 1 / sqrtf(sum / C + eps);
#pragma omp simd
        for (int c = 0; c < C; c++) y[c] = x[c] * scale * weight[c];
    }
}

/* rope.py: x is [N, H, D], its rows `stride` numbers apart; cos and sin are [N, D/2]. */
void rope(const float *x, const float *cos, const float *sin, float *y, int N, int H, int D,
          int stride) {
    int half = D / 2;
    for (int n = 0; n < N; n++)
        for (int h = 0; h < H; h++) {
            const float *from = x + (size_t)n * stride + h * D;
            float *to = y + ((size_t)n * H + h) * D;
#pragma omp simd
            for (int i = 0; i < half; i++) {
                float a = from[i], b = from[i + half], c = cos[n * half + i], s = sin[n * half + i];
                to[i] = a * c - b * s;
                to[i + half] = b * c + a * s;
            }
        }
}
