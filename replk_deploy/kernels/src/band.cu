// Large depthwise convolution on tensor cores: stride 1, "same" padding, fp32 accumulation.
//
// For one channel and one kernel row r, eight output columns starting at 8j of sixteen (image, row) pairs are a
// matrix product: input rows shifted by r - P, sixteen columns at a time, times a band of a Toeplitz matrix,
//     B[k][n] = w[r][8d + k - n + P],   d = chunk - j,
// which depends on the position only through d. So 2D + 1 registers hold a whole kernel row, whatever the width.
//
// A block owns one channel, IMG images and a tile of BH x BW outputs. The sixteen rows of a product are IMG images
// times 16 / IMG row groups, RS rows apart. A warp takes strips of TH output rows in turn; going down the input rows,
// each is loaded once and meets TH kernel rows, of which one is new.
//
// With SPLIT, values are fp32, and each is the sum of two bf16 ones, 16 bits of mantissa: the products of the greater
// parts and of a greater with a lesser one are added, those of two lesser ones left out.
//
// Constants by -D: K, H, W, IMG, TH, WARPS, BLOCKS (per multiprocessor, for the register limit), BH, BW, SKEW and PAD
// (16-byte units after each RS rows and each image, against bank conflicts), BF16, SPLIT, ACT (0 none, 1 ReLU, 2 GELU),
// AHEAD (1 where the kernel before this one on the stream never writes the weights).

typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;

#if SPLIT
typedef float T;
#else
typedef u16 T;
#endif

constexpr int P = K / 2;
constexpr int D = (P + 7) / 8;                  // chunks of eight columns that a kernel row reaches to either side
constexpr int HALO = W > BW ? D : 0;            // in chunks; a tile as wide as the map needs none
constexpr int NJ = BW / 8;                      // blocks of eight output columns
constexpr int NC = NJ + 2 * HALO;               // chunks of a row in shared memory
constexpr bool BANDED = H > BH;
constexpr int ROWS = BANDED ? BH + 2 * P : H;
constexpr int GROUPS = 16 / IMG;
constexpr int RS = ((BANDED ? BH : H) + GROUPS - 1) / GROUPS;
constexpr int STRIPS = (RS + TH - 1) / TH;
constexpr int ROW = NC * 16;                    // bytes
constexpr int IMAGE = ROWS * ROW + ((ROWS - 1) / RS) * SKEW * 16 + PAD * 16;
constexpr int FW = 8 * D + 8;                   // words of a kernel row between zeros
constexpr int OFFSET = 8 * D + 8 - P;           // zeros before it
constexpr int THREADS = WARPS * 32;
constexpr int PARTS = SPLIT ? 2 : 1;            // of a value
constexpr int FILTER = K * 2 * FW, TILE = IMG * IMAGE;  // of one part, in words and bytes
constexpr int VEC = W % 8 == 0 && !SPLIT ? 8 : W % 4 == 0 ? 4 : W % 2 == 0 ? 2 : 1;  // elements that lie aligned in any row
constexpr bool WHOLE = GROUPS == 1 && !BANDED && TH == H && K >= 2 * H - 1;  // every output row sees every input row

extern __shared__ __align__(16) unsigned char shared[];  // filter, row of zeros, images

__device__ __forceinline__ u32 address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

template <int BYTES>
__device__ __forceinline__ void copy_async(u32 to, const void* from) {
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(BYTES) : "memory");
}

__device__ __forceinline__ float widen(T v) {
#if SPLIT
  return v;
#elif BF16
  return __uint_as_float((u32)v << 16);
#else
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
  return f;
#endif
}

__device__ __forceinline__ u32 narrow(float low, float high) {
  u32 r;
#if BF16
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#endif
  return r;
}

#if SPLIT
// Two values, the first in the low half; the greater parts, or what they leave.
__device__ __forceinline__ u32 part_of(float low, float high, int part) {
  const u32 greater = narrow(low, high);
  if (!part) return greater;
  return narrow(low - __uint_as_float(greater << 16), high - __uint_as_float(greater & 0xffff0000u));
}

template <int N>
__device__ __forceinline__ void load_values(float (&values)[N], const float* from) {
  if constexpr (N == 4) {
    const float4 four = *(const float4*)from;
    values[0] = four.x, values[1] = four.y, values[2] = four.z, values[3] = four.w;
  } else if constexpr (N == 2) {
    const float2 two = *(const float2*)from;
    values[0] = two.x, values[1] = two.y;
  } else {
    values[0] = *from;
  }
}
#endif

__device__ __forceinline__ u32 paired(T low, T high, int part) {
#if SPLIT
  return part_of(low, high, part);
#else
  return low | (u32)high << 16;
#endif
}

__device__ __forceinline__ void load4(u32 (&a)[4], u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(at) : "memory");
}

__device__ __forceinline__ void load2(u32 (&a)[4], u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(a[0]), "=r"(a[1]) : "r"(at) : "memory");
}

#if BF16
#define TYPES "f32.bf16.bf16.f32"
#else
#define TYPES "f32.f16.f16.f32"
#endif

__device__ __forceinline__ void product16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col." TYPES " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void product8(float (&c)[4], u32 a0, u32 a1, u32 b) {
  asm("mma.sync.aligned.m16n8k8.row.col." TYPES " {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(b));
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

// Where a row of the tile begins, from the first row of its image.
__device__ __forceinline__ u32 row_at(int row) { return row * ROW + (SKEW ? row / RS * (SKEW * 16) : 0); }

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

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
band(const T* __restrict__ x, const T* __restrict__ w, const T* __restrict__ bias, T* __restrict__ y,
     int images, int x_image, int x_channel, int y_image, int y_channel) {
  u32* const filter = (u32*)shared;
  unsigned char* const zeros = shared + PARTS * FILTER * 4;
  unsigned char* const tile = zeros + ROW;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int channel = blockIdx.x, first = blockIdx.y * IMG;
  constexpr int ACROSS = (W + BW - 1) / BW;
  const int top = blockIdx.z / ACROSS * BH, left = blockIdx.z % ACROSS * BW;
  const int from_row = BANDED ? top - P : 0, from_column = left - HALO * 8;

  let_next_start();
  if (!AHEAD) wait_for_input();
  for (int i = threadIdx.x; i < ROW / 4; i += THREADS) ((u32*)zeros)[i] = 0;
  for (int i = threadIdx.x; i < FILTER; i += THREADS) {  // each row twice, the second one element further
    const int word = i % FW, odd = i / FW % 2, r = i / (2 * FW), s = 2 * word + odd - OFFSET;
    const T* const taps = w + (channel * K + r) * K;
    const T low = (unsigned)s < K ? taps[s] : T(0), high = (unsigned)(s + 1) < K ? taps[s + 1] : T(0);
#pragma unroll
    for (int part = 0; part < PARTS; part++) filter[part * FILTER + i] = paired(low, high, part);
  }
  if (AHEAD) wait_for_input();

  const T* const plane = x + (i64)channel * x_channel + (i64)first * x_image;
  constexpr int PIECES = NC * 8 / VEC;
  for (int i = threadIdx.x; i < ROWS * PIECES; i += THREADS) {
    const int piece = i % PIECES, row = i / PIECES, column = from_column + piece * VEC, from = from_row + row;
    unsigned char* to = tile + row_at(row) + piece * (VEC * 2);
    const T* source = plane + (i64)from * W + column;
    const bool inside = (unsigned)from < H && (unsigned)column < W;
#pragma unroll
    for (int image = 0; image < IMG; image++, to += IMAGE, source += x_image) {
#if SPLIT
      T values[VEC] = {};
      if (inside && first + image < images) load_values(values, source);
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        if constexpr (VEC == 1) *(u16*)(to + part * TILE) = (u16)part_of(values[0], 0.0f, part);
        else
#pragma unroll
          for (int v = 0; v < VEC / 2; v++)
            ((u32*)(to + part * TILE))[v] = part_of(values[2 * v], values[2 * v + 1], part);
      }
#else
      if constexpr (VEC == 1) {
        *(u16*)to = inside && first + image < images ? *source : 0;
      } else if (inside && first + image < images) {
        copy_async<VEC * 2>(address(to), source);
      } else {
#pragma unroll
        for (int v = 0; v < VEC / 2; v++) ((u32*)to)[v] = 0;
      }
#endif
    }
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();

  const int g = lane >> 2, t = lane & 3;
  const u32* const taps = filter + (8 + 2 * t - g - (g & 1)) / 2 + (g & 1) * FW;
  const int pair = lane & 15, group = pair / IMG;
  const u32 image_at = address(tile) + pair % IMG * IMAGE + (lane >> 4) * 16;
  const u32 zeros_at = address(zeros) + (lane >> 4) * 16;
  const float start = bias ? widen(bias[channel]) : 0.0f;

  for (int strip = warp; strip < STRIPS; strip += WARPS) {
    const int offset = strip * TH;  // of the strip in its row group
    float sum[TH][NJ][4];
#pragma unroll
    for (int h = 0; h < TH; h++)
#pragma unroll
      for (int j = 0; j < NJ; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) sum[h][j][e] = start;

    // rho is the kernel row that the first output row of the strip meets; the one at h meets rho - h
    int rho0 = 0, rho1 = K + TH - 1;
    if constexpr (WHOLE) {
      rho0 = P;
      rho1 = P + H;
    } else if constexpr (GROUPS == 1) {  // the same input row for all: none outside the map
      rho0 = max(0, P - (top + offset));
      rho1 = min(H - 1 - (top + offset), TH - 1 + P) + P + 1;
    }
#pragma unroll 1
    for (int pass = SPLIT ? 2 : 0; pass >= 0; pass--) {  // lesser with greater, greater with lesser, both greater
      const u32* const rows = taps + (pass == 1) * FILTER;
      const u32 part_at = image_at + (pass == 2) * TILE;
      u32 band[TH][2 * D + 1];
#pragma unroll
      for (int h = 1; h < TH; h++)
#pragma unroll
        for (int d = 0; d < 2 * D + 1; d++)
          band[TH - h][d] = rho0 - h >= 0 && rho0 - h < K ? rows[(rho0 - h) * 2 * FW + 4 * d] : 0;

      for (int step = rho0; step < rho1; step += TH) {
#pragma unroll
        for (int u = 0; u < TH; u++) {
          const int rho = step + u;
          if (WHOLE || rho < rho1) {
            const int row = group * RS + offset + rho - (BANDED ? 0 : P);
            u32 at = part_at + row_at(row);
            if ((GROUPS > 1 || BANDED) && (unsigned)row >= ROWS) at = zeros_at;
            u32 a[(NC + 1) / 2][4];
#pragma unroll
            for (int p = 0; p < NC / 2; p++) load4(a[p], at + p * 32);
            if constexpr (NC % 2) load2(a[NC / 2], at + NC / 2 * 32);
            if (WHOLE || rho < K) {
#pragma unroll
              for (int d = 0; d < 2 * D + 1; d++) band[u][d] = rows[rho * 2 * FW + 4 * d];
            }
#pragma unroll
            for (int h = 0; h < TH; h++) {
              const u32(&b)[2 * D + 1] = band[(u - h + TH) % TH];
              if (WHOLE || (rho - h >= 0 && rho - h < K)) {
#pragma unroll
                for (int p = 0; p < (NC + 1) / 2; p++)
#pragma unroll
                  for (int j = 0; j < NJ; j++) {
                    const int d = 2 * p - HALO - j + D;  // index of the first chunk's register
                    const bool one = d >= 0 && d <= 2 * D, two = d + 1 >= 0 && d + 1 <= 2 * D && 2 * p + 1 < NC;
                    if (one && two) product16(sum[h][j], a[p], b[d], b[d + 1]);
                    else if (one) product8(sum[h][j], a[p][0], a[p][1], b[d]);
                    else if (two) product8(sum[h][j], a[p][2], a[p][3], b[d + 1]);
                  }
              }
            }
          }
        }
      }
    }

#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int m = g + half * 8, image = first + m % IMG;
      if (image >= images) continue;
      T* const out = y + (i64)image * y_image + (i64)channel * y_channel;
#pragma unroll
      for (int h = 0; h < TH; h++) {
        const int in_group = offset + h, row = top + m / IMG * RS + in_group;
        if (in_group >= RS || row >= H || (BANDED && m / IMG * RS + in_group >= BH)) continue;
#pragma unroll
        for (int j = 0; j < NJ; j++) {
          const int column = left + 8 * j + 2 * t;
          const float low = activated(sum[h][j][2 * half]), high = activated(sum[h][j][2 * half + 1]);
          T* const to = out + (i64)row * W + column;
#if SPLIT
          if constexpr (W % 2 == 0) {
            if (column < W) *(float2*)to = make_float2(low, high);
          } else {
            if (column < W) to[0] = low;
            if (column + 1 < W) to[1] = high;
          }
#else
          const u32 both = narrow(low, high);
          if constexpr (W % 2 == 0) {
            if (column < W) *(u32*)to = both;
          } else {
            if (column < W) to[0] = (u16)both;
            if (column + 1 < W) to[1] = (u16)(both >> 16);
          }
#endif
        }
      }
    }
  }
}
