// Small depthwise convolution, stride 1 or 2, padding K / 2, with bias and activation; sums in fp32.
//
// A thread owns V neighbouring output columns of one row and reads the V * STRIDE input columns under them at once.
//
// Constants by -D: K, STRIDE, H, W (of the input), V (divides the output's width; V * STRIDE divides W), BF16, ACT.

typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;

constexpr int P = K / 2, OH = (H - 1) / STRIDE + 1, OW = (W - 1) / STRIDE + 1;
constexpr int UNDER = V * STRIDE;                    // columns of the aligned part
constexpr int SPAN = (V - 1) * STRIDE + K;           // columns from the first tap to the last
constexpr bool WIDE = W % UNDER == 0 && UNDER % 2 == 0;

__device__ __forceinline__ float widen(u16 v) {
#if BF16
  return __uint_as_float((u32)v << 16);
#else
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
  return f;
#endif
}

__device__ __forceinline__ u16 narrow(float v) {
  u16 r;
#if BF16
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v));
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(v));
#endif
  return r;
}

template <int N>
struct alignas(N * 2 < 16 ? N * 2 : 16) Columns {
  u16 at[N];
};

// A kernel starts while the one before it ends; until `wait_for_input` it must touch nothing that this one writes:
// here that is all but the weights, because only a network uses this kernel.
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

extern "C" __global__ void __launch_bounds__(256)
small(const u16* __restrict__ x, const u16* __restrict__ w, const u16* __restrict__ bias, u16* __restrict__ y,
      int images, int x_image, int x_channel, int y_image, int y_channel) {
  const int channel = blockIdx.y, i = blockIdx.x * 256 + threadIdx.x;
  const int across = i % (OW / V) * V, row = i / (OW / V) % OH, image = i / (OW / V * OH);
  let_next_start();
  if (image >= images) return;
  float taps[K * K], sum[V];
#pragma unroll
  for (int k = 0; k < K * K; k++) taps[k] = widen(w[channel * K * K + k]);
#pragma unroll
  for (int v = 0; v < V; v++) sum[v] = widen(bias[channel]);
  wait_for_input();
  const u16* const plane = x + (i64)image * x_image + (i64)channel * x_channel;
#pragma unroll
  for (int r = 0; r < K; r++) {
    const int from = row * STRIDE + r - P, left = across * STRIDE;
    if ((unsigned)from >= H) continue;
    const u16* const line = plane + (i64)from * W;
    float input[SPAN];
    if constexpr (WIDE) {
      const Columns<UNDER> under = *(const Columns<UNDER>*)(line + left);
#pragma unroll
      for (int s = 0; s < SPAN; s++) {
        const int column = left + s - P;
        if (s >= P && s < P + UNDER) input[s] = widen(under.at[s - P]);
        else input[s] = (unsigned)column < W ? widen(line[column]) : 0.0f;
      }
    } else {
#pragma unroll
      for (int s = 0; s < SPAN; s++) input[s] = (unsigned)(left + s - P) < W ? widen(line[left + s - P]) : 0.0f;
    }
#pragma unroll
    for (int v = 0; v < V; v++)
#pragma unroll
      for (int s = 0; s < K; s++) sum[v] = fmaf(taps[r * K + s], input[v * STRIDE + s], sum[v]);
  }
  Columns<V> found;
#pragma unroll
  for (int v = 0; v < V; v++) found.at[v] = narrow(ACT == 1 && sum[v] < 0.0f ? 0.0f : sum[v]);
  *(Columns<V>*)(y + (i64)image * y_image + (i64)channel * y_channel + (i64)row * OW + across) = found;
}
