"""Matrix products with bias, activation and residual inside, in Triton; imported only where Triton is installed.

Activations lie channel by channel, [C, pitch], so that a 1x1 convolution of any batch is one product of its weight
with them, and the first convolution one of its weight with the patches of the images.

With LINKED a kernel starts while the one before it ends (programmatic dependent launch): until `gdc_wait` it touches
only weights, which it brings to the L2 cache.
"""

import triton
import triton.language as tl
from triton.language.extra import cuda


@triton.jit
def _activated(v, ACT: tl.constexpr):
    if ACT == 1:
        v = tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if ACT == 2:  # exact GELU; erf(v / sqrt 2) / v is a polynomial in v², fitted here, and erf 1 from 4.25 on
        t = v * v
        p = 1.144042500e-10 * t - 1.088751755e-08
        p = p * t + 4.581933126e-07
        p = p * t - 1.136789797e-05
        p = p * t + 1.878921757e-04
        p = p * t - 2.222570824e-03
        p = p * t + 1.964673959e-02
        p = p * t - 1.327068210e-01
        p = p * t + 7.978108525e-01
        half = 0.5 * v
        near = half * (v * p) + half  # of NaN, too
        v = tl.where(v > 4.25, v, tl.where(v < -4.25, v * 0.0, near))
    return v


@triton.jit
def _prefetch(w, M, K, m):
    for k in range(0, K, 64):  # a line of 128 bytes
        address = (w + m.to(tl.int64) * K + k).to(tl.int64)
        address = tl.where(m < M, address, w.to(tl.int64))
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def product(
    w, x, bias, residual, y, M, N, K, pitch,
    ACT: tl.constexpr, ADD: tl.constexpr, EVEN: tl.constexpr, LINKED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y[M, N] = activation(w[M, K] @ x[K, N] + bias[M] + residual[M, N]); rows of x and y lie a pitch apart."""
    tiles = tl.cdiv(M, BM)
    pid = tl.program_id(0)
    m = pid % tiles * BM + tl.arange(0, BM)  # tiles of one stretch of x follow one another, and find it in the cache
    n = pid // tiles * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    ws = w + m[:, None].to(tl.int64) * K + k[None, :]
    xs = x + k[:, None].to(tl.int64) * pitch + n[None, :]
    rows, columns = m < M, n < N
    total = tl.zeros((BM, BN), dtype=tl.float32) + tl.load(bias + m, mask=rows, other=0.0).to(tl.float32)[:, None]
    if LINKED:
        cuda.gdc_launch_dependents()
        _prefetch(w, M, K, m)
        cuda.gdc_wait()
    for at in range(0, K, BK):
        if EVEN:
            a = tl.load(ws, mask=rows[:, None], other=0.0)
            b = tl.load(xs, mask=columns[None, :], other=0.0)
        else:
            a = tl.load(ws, mask=rows[:, None] & (k[None, :] < K - at), other=0.0)
            b = tl.load(xs, mask=columns[None, :] & (k[:, None] < K - at), other=0.0)
        total = tl.dot(a, b, total)
        ws += BK
        xs += BK * pitch.to(tl.int64)
    place = m[:, None].to(tl.int64) * pitch + n[None, :]
    inside = rows[:, None] & columns[None, :]
    if ADD:
        total += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place, _activated(total, ACT).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _finish(total, bias, residual, y, m0, n0, ACT: tl.constexpr, ADD: tl.constexpr):
    total += bias
    if ADD:
        total += residual.load([m0, n0]).to(tl.float32)
    y.store([m0, n0], _activated(total, ACT).to(y.dtype))


@triton.jit
def product_tiles(
    w, w_tiles, x, bias, residual, y, M, N, K, programs,
    ACT: tl.constexpr, ADD: tl.constexpr, LINKED: tl.constexpr, HALVES: tl.constexpr, FLAT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute what `product` does on tensor descriptors, which Hopper's copy engine reads; each program takes tiles.

    With HALVES a tile is finished in two halves, which takes less shared memory.
    """
    tiles_m = tl.cdiv(M, BM)
    if LINKED:
        cuda.gdc_launch_dependents()
        _prefetch(w, M, K, tl.program_id(0) % tiles_m * BM + tl.arange(0, BM))
        cuda.gdc_wait()
    for tile in tl.range(tl.program_id(0), tiles_m * tl.cdiv(N, BN), programs, flatten=FLAT):
        m0, n0 = tile % tiles_m * BM, tile // tiles_m * BN
        total = tl.zeros((BM, BN), dtype=tl.float32)
        for k in range(0, K, BK):
            total = tl.dot(w_tiles.load([m0, k]), x.load([k, n0]), total)
        m = m0 + tl.arange(0, BM)
        shift = tl.load(bias + m, mask=m < M, other=0.0).to(tl.float32)[:, None]
        if HALVES:
            left, right = total.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
            _finish(left, shift, residual, y, m0, n0, ACT, ADD)
            _finish(right, shift, residual, y, m0, n0 + BN // 2, ACT, ADD)
        else:
            _finish(total, shift, residual, y, m0, n0, ACT, ADD)


@triton.jit
def first(
    images, w, bias, scale, shift, y, N, H, W, OH, OW, M, by_image, by_channel, by_row, by_column, pitch,
    PATCH: tl.constexpr, PIXELS: tl.constexpr, LINKED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """y[M, N * OH * OW] = relu(conv(images[N, 3, H, W], w[M, PATCH], 3x3, stride 2, padding 1) + bias).

    With PIXELS the images are uint8, and scale * value + shift is what is convolved; the padding stays zero.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    k = tl.arange(0, PATCH)
    channel, r, s = k // 9, k // 3 % 3, k % 3
    image, row, column = n // (OH * OW), n // OW % OH, n % OW
    at_row = row[None, :] * 2 + r[:, None] - 1
    at_column = column[None, :] * 2 + s[:, None] - 1
    inside = (at_row >= 0) & (at_row < H) & (at_column >= 0) & (at_column < W) & (k[:, None] < 27)
    inside &= n[None, :] < N * OH * OW
    place = (
        image[None, :].to(tl.int64) * by_image + channel[:, None] * by_channel + at_row * by_row + at_column * by_column
    )
    a = tl.load(w + m[:, None] * PATCH + k[None, :], mask=m[:, None] < M, other=0.0)
    start = tl.load(bias + m, mask=m < M, other=0.0).to(tl.float32)[:, None]
    if LINKED:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    patches = tl.load(images + place, mask=inside, other=0)
    if PIXELS:
        factor = tl.load(scale + channel, mask=k < 27, other=0.0)[:, None]
        offset = tl.load(shift + channel, mask=k < 27, other=0.0)[:, None]
        patches = tl.where(inside, patches.to(tl.float32) * factor + offset, 0.0)
    total = tl.dot(a, patches.to(a.dtype)) + start
    out = y + m[:, None].to(tl.int64) * pitch + n[None, :]
    keep = (m[:, None] < M) & (n[None, :] < N * OH * OW)
    tl.store(out, _activated(total, 1).to(y.dtype.element_ty), mask=keep)
