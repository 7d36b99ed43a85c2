// Rate of mma.sync, alone or with one ldmatrix for every four products: what a kernel of tensor cores can reach.
// WIDE: m16n8k16, else m16n8k8. FEED: whether operand A comes from shared memory. CHAINS: independent sums of a warp.
#include <cuda_fp16.h>

static __device__ __forceinline__ void product(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if WIDE
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(b[0]));
#endif
}

extern "C" __global__ void __launch_bounds__(256) rates(float* out, long long rounds) {
  __shared__ alignas(16) unsigned tile[256 * 4];
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int i = 0; i < 4; ++i) tile[threadIdx.x * 4 + i] = 0;
  __syncthreads();
  unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(tile + warp * 128 + lane * 4));
  unsigned a[4] = {0, 0, 0, 0}, b[2] = {lane, 0};
  float c[CHAINS][4] = {};
  for (long long round = 0; round < rounds; ++round) {
#pragma unroll
    for (int chain = 0; chain < CHAINS; ++chain) {
#if FEED
      if (chain % 4 == 0)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(at));
#endif
      product(c[chain], a, b);
    }
  }
  float sum = 0;
  for (int chain = 0; chain < CHAINS; ++chain) for (int i = 0; i < 4; ++i) sum += c[chain][i];
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}
