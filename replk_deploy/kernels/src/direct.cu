// Large depthwise convolution on CUDA cores, in fp32 whatever the type: stride 1, "same" padding.
//
// The plain sum over the kernel, the yardstick of band.cu and the way of fp32. A thread owns eight neighbouring
// columns of one output row; a block owns PLANES images of a channel and a tile of BH x BW outputs each.
//
// Constants by -D: K, H, W, BH, BW (a multiple of 8), PLANES, TYPE (0 fp16, 1 bf16, 2 fp32), ACT (0 none, 1 ReLU,
// 2 GELU), AHEAD (1 where the kernel before this one on the stream never writes the weights).

typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;

#if TYPE == 2
typedef float T;
#else
typedef u16 T;
#endif

constexpr int P = K / 2;
constexpr int ACROSS = (W + BW - 1) / BW;
constexpr int SPAN = BW + K - 1, ROWS = BH + K - 1, PITCH = SPAN + 1;
constexpr int THREADS = PLANES * BH * (BW / 8);

__device__ __forceinline__ float widen(T v) {
#if TYPE == 2
  return v;
#elif TYPE == 1
  return __uint_as_float((u32)v << 16);
#else
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
  return f;
#endif
}

__device__ __forceinline__ T narrow(float v) {
#if TYPE == 2
  return v;
#else
  T r;
#if TYPE == 1
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v));
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(v));
#endif
  return r;
#endif
}

__device__ __forceinline__ float activated(float v) {
#if ACT == 1
  return v < 0.0f ? 0.0f : v;  // NaN stays
#elif ACT == 2
  return 0.5f * v * (1.0f + erff(v * 0.70710678118654752f));
#else
  return v;
#endif
}

extern __shared__ float shared[];  // filter, tiles

// A kernel starts while the one before it ends; until `wait_for_input` it must touch nothing that this one writes.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ void wait_for_input() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS)
direct(const T* __restrict__ x, const T* __restrict__ w, const T* __restrict__ bias, T* __restrict__ y,
       int images, int x_image, int x_channel, int y_image, int y_channel) {
  float* const tile = shared + K * K;
  const int channel = blockIdx.x, first = blockIdx.y * PLANES;
  const int top = blockIdx.z / ACROSS * BH, left = blockIdx.z % ACROSS * BW;

  let_next_start();
  if (!AHEAD) wait_for_input();
  for (int i = threadIdx.x; i < K * K; i += THREADS) shared[i] = widen(w[channel * K * K + i]);
  if (AHEAD) wait_for_input();
  for (int i = threadIdx.x; i < PLANES * ROWS * SPAN; i += THREADS) {
    const int s = i % SPAN, r = i / SPAN % ROWS, image = first + i / (SPAN * ROWS);
    const int row = top + r - P, column = left + s - P;
    const bool inside = image < images && (unsigned)row < H && (unsigned)column < W;
    const T* const line = x + (i64)image * x_image + (i64)channel * x_channel + (i64)row * W;
    tile[i / SPAN * PITCH + s] = inside ? widen(line[column]) : 0;
  }
  __syncthreads();

  constexpr int LANES = BW / 8;
  const int lane = threadIdx.x % LANES, in_tile = threadIdx.x / LANES % BH, plane = threadIdx.x / (LANES * BH);
  const int image = first + plane, row = top + in_tile;
  if (image >= images || row >= H) return;
  float sum[8];
#pragma unroll
  for (int v = 0; v < 8; v++) sum[v] = bias ? widen(bias[channel]) : 0.0f;
  const int r0 = max(0, P - row), r1 = min(K, H + P - row);
  const float* input = tile + (plane * ROWS + in_tile + r0) * PITCH + lane * 8;
  const float* taps = shared + r0 * K;
  for (int r = r0; r < r1; r++, input += PITCH, taps += K) {
    float window[K + 7];
#pragma unroll
    for (int s = 0; s < K + 7; s++) window[s] = input[s];
#pragma unroll
    for (int s = 0; s < K; s++) {
      const float tap = taps[s];
#pragma unroll
      for (int v = 0; v < 8; v++) sum[v] = fmaf(tap, window[s + v], sum[v]);
    }
  }
  T* const out = y + (i64)image * y_image + (i64)channel * y_channel + (i64)row * W;
#pragma unroll
  for (int v = 0; v < 8; v++)
    if (left + lane * 8 + v < W) out[left + lane * 8 + v] = narrow(activated(sum[v]));
}
