r"""Each family of kernels once, on one stream and without CUDA graphs, for NVIDIA's sanitizer.

    for tool in memcheck racecheck initcheck; do
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --report-api-errors no --error-exitcode 9 \
        --target-processes all python -m tests.sanitized || break
    done

Without PyTorch's cache of memory each tensor is an allocation of its own, so that a step beyond it is seen. NVIDIA's
packages ask the driver for functions it need not have, which are the errors of its API that are not reported; and
initcheck does not see what the tensor copy engine writes, so the outputs of the products are NaN before.
"""

import torch

from replk_deploy.kernels import large_depthwise_conv2d, matrix, nvrtc, op, tuning
from replk_deploy.kernels.launch import Direct, Shape, candidates
from replk_deploy.kernels.layers import First, Maps, Small

SHAPES = [  # images, channels, height, width, kernel: whole map, halves of it, columns cut, odd sizes
    (3, 2, 7, 7, 13),
    (16, 2, 14, 14, 27),
    (2, 2, 28, 28, 29),
    (1, 2, 56, 56, 31),
    (1, 1, 40, 200, 31),
    (3, 1, 9, 33, 7),
]


def filled(*size: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Return values that were all written, made on the CPU, where nobody watches."""
    return torch.randn(size).to(dtype).cuda()


def large() -> int:
    """Run a tile of each way in which maps are cut, on tensor cores and on CUDA cores."""
    done, (count, shared) = 0, nvrtc.limits()
    for images, channels, height, width, kernel in SHAPES:
        shape = Shape(images=images, channels=channels, height=height, width=width, kernel=kernel)
        found = candidates(shape, "float16", multiprocessors=count, shared=shared, most=10**6)
        ways = {(t.images, t.banded, t.strip > 1): t for t in reversed(found) if t.name == "band"}
        x, weight, bias = filled(images, channels, height, width), filled(channels, 1, kernel, kernel), filled(channels)
        for tile in (*ways.values(), Direct.of(shape, shared)):
            tuning._decided.clear()
            tuning.fastest = lambda _work, _ways, _start, tile=tile: tile
            y = torch.empty_like(x)
            op.convolve(x, weight, bias, "gelu", y, ahead=bool(done % 2))
            assert y.isfinite().all()
            done += 1
    tuning.fastest = lambda _work, ways, _start: ways[0]
    for dtype, tf32 in ((torch.float32, True), (torch.float32, False), (torch.bfloat16, False)):
        torch.backends.cudnn.allow_tf32 = tf32
        values = filled(2, 3, 9, 10, dtype=dtype), filled(3, 1, 13, 13, dtype=dtype)
        assert large_depthwise_conv2d(*values).isfinite().all()
        done += 1
    return done


def network() -> int:
    """Run each kernel that only the network uses, in each cut of a product that this GPU can have."""
    first = First(torch.nn.Conv2d(3, 24, 3, 2, 1), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)).cuda().half()
    pixels = torch.randint(0, 256, (2, 30, 34, 3), dtype=torch.uint8).cuda()
    maps = [first(filled(2, 3, 30, 34)), first(pixels)]
    for stride in (1, 2):
        conv = torch.nn.Conv2d(24, 24, 3, stride, 1, groups=24)
        maps += [Small(conv).cuda().half()(maps[0])]
    done = len(maps)
    rows, depth = 72, 40  # no multiples of a tile
    weight, bias, x = filled(rows, depth), filled(rows), Maps(filled(depth, 272), 1, 1, 270)
    shared, linked = nvrtc.limits()[1], matrix.linked()
    for cut in matrix.CUTS:
        for residual in (None, filled(rows, 272)):
            if cut.shared(residual=residual is not None) <= shared and (linked or not cut.each):
                y = torch.full((rows, 272), torch.nan, dtype=torch.float16, device="cuda")
                matrix._start(weight, x.data, bias, residual, y, "gelu", cut)
                assert y[:, :270].isfinite().all()
                done += 1
    torch.cuda.synchronize()
    assert all(m.view.isfinite().all() for m in maps)
    return done


if __name__ == "__main__":
    print(large() + network(), "launches")
