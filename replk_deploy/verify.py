"""Two answers to the same images → how far apart, and whether that is inside.

Images are judged one by one and the worst decides: a batch must not dilute its bad row. The bound is
what the precision itself costs PyTorch on this network and these images, times a factor. Whatever is
not inside fails, so NaN fails.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from replk_deploy import onednn
from replk_deploy.backends.base import Backend
from replk_deploy.errors import ContractError, InconclusiveError, MismatchError
from replk_deploy.metadata import State
from replk_deploy.models.base import Network
from replk_deploy.precision import TOLERANCES, Precision, algebra_gate
from replk_deploy.preprocess import Preprocessing

Array = npt.NDArray[Any]
Answer = Callable[[Array], Mapping[str, Array]]
PEAK = 4  # the largest element may be off by this many times the bound on the whole; measured 1 to 2
SIGNAL = 1e-2  # two images must differ at least this much in the output, or every relative gate is blind


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Images with a name each: [N, C, H, W] float32 normalised, or [N, H, W, C] uint8; C is 3 for networks of ours."""

    names: tuple[str, ...]
    images: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """How far an output may be off in relative L2, and the sentence that says why."""

    rel_l2: Mapping[str, float]
    eager: Mapping[str, float]
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One image, one output."""

    image: str
    output: str
    rel_l2: float
    max_abs: float
    peak: float
    share: float
    top1: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How far a candidate is from its reference, image by image.

    Attributes:
        signal: relative difference between the reference's answers to two images.
        noise: relative difference between two runs of the candidate; None when not probed.
        undecidable: share of images whose two best classes are closer than the bound can tell.
        doubt: why the verdict vouches for less than it seems, empty when it does not.
    """

    KIND: ClassVar[str] = "agreement"
    FORMAT: ClassVar[int] = 1
    DERIVED: ClassVar[tuple[str, ...]] = ("state", "rel_l2", "worst", "flips", "ties", "sentence")

    name: str
    precision: str
    rows: tuple[Row, ...]
    bound: Bound
    signal: float
    noise: float | None
    undecidable: float
    doubt: str = ""
    against: str = "float64"

    @property
    def passed(self) -> bool:
        """Tell whether every image is inside the bound and no decidable class flipped."""
        return bool(self.rows) and all(r.share <= 1 for r in self.rows) and self.flips == 0

    @property
    def state(self) -> State:
        """Return the verdict's word."""
        return "rejected" if not self.passed else "provisional" if self.doubt else "pass"

    @property
    def worst(self) -> float:
        """Return the largest share of the allowance that was used."""
        return max((r.share for r in self.rows), default=math.inf)

    @property
    def rel_l2(self) -> float:
        """Return the largest relative L2 error of an image."""
        return _worst([r.rel_l2 for r in self.rows])

    @property
    def flips(self) -> int:
        """Count images whose class changed by more than the bound can excuse."""
        return sum(r.top1 == "flip" for r in self.rows)

    @property
    def ties(self) -> int:
        """Count images whose class changed between two that are too close to tell apart."""
        return sum(r.top1 == "tie" for r in self.rows)

    @property
    def sentence(self) -> str:
        """Say the finding in words."""
        worst = max(self.rows, key=lambda r: r.share)
        limit = self.bound.rel_l2[worst.output]
        eager = self.bound.eager.get(worst.output)
        found = f"{worst.image}: {worst.output} is {worst.rel_l2:.1e} from {self.against}, limit {limit:.1e}"
        if not eager:
            return found
        times = worst.rel_l2 / max(eager, TOLERANCES["fp32"].floor)
        return f"{found} ({times:.2g}x PyTorch's own {self.precision} error)"


def normal(size: tuple[int, int], *, count: int = 2, seed: int = 0, channels: int = 3) -> Probe:
    """Make unlike images of seeded normal noise in the normalised scale."""
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((count, channels, *size)).astype(np.float32)
    return Probe(names=tuple(f"normal {i}" for i in range(count)), images=images)


def special(size: tuple[int, int], *, seed: int = 1) -> Probe:
    """Make two normal images, one of zeros, impulses at the centre and corners, and one ten times as strong."""
    rng = np.random.default_rng(seed)
    height, width = size
    images = np.zeros((9, 3, height, width), np.float32)
    images[:2] = rng.standard_normal((2, 3, height, width))
    spots = {"centre": (height // 2, width // 2), "top left": (0, 0), "top right": (0, -1)}
    spots |= {"bottom left": (-1, 0), "bottom right": (-1, -1)}
    for image, (y, x) in zip(images[3:8], spots.values(), strict=True):
        image[:, y, x] = rng.standard_normal(3)
    images[8] = 10 * rng.standard_normal((3, height, width))
    return Probe(names=("normal 0", "normal 1", "zeros", *(f"impulse {s}" for s in spots), "10 sigma"), images=images)


def pictures(size: tuple[int, int], *, count: int = 2, seed: int = 0, channels: int = 3) -> Probe:
    """Make unlike images of seeded uniform bytes, for networks with the preprocessing inside."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, *size, channels), dtype=np.uint8)
    return Probe(names=tuple(f"uniform {i}" for i in range(count)), images=images)


def answer_of(model: Network, *, preprocessing: Preprocessing | None = None) -> Answer:
    """Return a function that gives a network's answers in its own precision, one image at a time.

    Args:
        model: in eval mode, on the CPU.
        preprocessing: applied to uint8 images, as written there; None takes normalised images.
    """
    parameter, stalls = next(model.parameters()), onednn.stalls(model)
    # measured in docs/benchmarks/layout.json: float64 is faster in planes, all else with channels last
    layout = torch.contiguous_format if parameter.dtype == torch.float64 else torch.channels_last

    def answer(images: Array) -> dict[str, Array]:
        if preprocessing is not None:
            scaled = images.astype(np.float64) / 255
            images = ((scaled - np.array(preprocessing.mean)) / np.array(preprocessing.std)).transpose(0, 3, 1, 2)
        outs: list[tuple[Array, ...]] = []
        with torch.inference_mode(), onednn.avoided(stalls):
            for image in images:
                batch = torch.from_numpy(np.ascontiguousarray(image[None])).to(parameter.dtype, memory_format=layout)
                outs.append(tuple(out.double().numpy() for out in model(batch)))
        columns = (np.concatenate(column) for column in zip(*outs, strict=True))
        return dict(zip(model.geometry.outputs, columns, strict=True))

    return answer


def in_batches(answer: Answer, least: int, most: int) -> Answer:
    """Return an answer for any number of images from one that takes `least` to `most` at a time."""

    def batched(images: Array) -> dict[str, Array]:
        chunks = []
        for start in range(0, len(images), most):
            chunk = images[start : start + most]
            rows = np.arange(max(least, len(chunk))) % len(chunk)
            chunks.append({name: out[: len(chunk)] for name, out in answer(chunk[rows]).items()})
        return {name: np.concatenate([c[name] for c in chunks]) for name in chunks[0]}

    return batched


def any_batch(backend: Backend) -> Answer:
    """Return an open backend's answer for any number of images, whatever it takes at a time."""
    fixed = backend.input.shape[0]
    if fixed is not None:
        return in_batches(backend.run, fixed, fixed)
    if backend.batches:
        widest = max(backend.batches, key=lambda batch: batch.max)
        return in_batches(backend.run, widest.min, widest.max)
    return backend.run


def calibrate(
    expected: Mapping[str, Array], eager: Answer, probe: Probe, precision: Precision, *, limit: bool
) -> Bound:
    """Return the bound that a precision deserves on this network and these images.

    Args:
        expected: the float64 answers.
        eager: PyTorch at the precision in question.
        probe: the images.
        precision: its row of the table decides factor and limit.
        limit: whether to refuse a network that does not survive the precision.

    Raises:
        MismatchError: PyTorch's own error at this precision is above the limit of the table.
    """
    row, own = TOLERANCES[precision], eager(probe.images)
    errors = {name: _worst(_rel_l2(own[name], ref)) for name, ref in expected.items()}
    bad = {name: e for name, e in errors.items() if not e <= row.limit}
    if limit and bad:
        name, error = next(iter(bad.items()))
        raise MismatchError(
            f"this checkpoint does not survive {precision}: PyTorch's own {name} is {error:.1e} from float64, "
            f"limit {row.limit:.0e}",
            "use --precision fp32"
            if precision != "fp32"
            else "train with a larger BatchNorm eps or look for exploding layers",
        )
    bounds = {name: row.factor * max(e, row.floor) for name, e in errors.items()}
    return Bound(rel_l2=bounds, eager=errors, why=f"{row.factor:g} x PyTorch {precision}")


def algebra(fp32: Bound) -> Bound:
    """Return the bound for exact algebra in float64, from how hard the network is for float32."""
    gates = {name: algebra_gate(error) for name, error in fp32.eager.items()}
    return Bound(rel_l2=gates, eager={}, why="float64 algebra")


def fixed(expected: Mapping[str, Array], rel_l2: float, why: str) -> Bound:
    """Return the same bound for every output."""
    return Bound(rel_l2=dict.fromkeys(expected, rel_l2), eager={}, why=why)


def verify(
    expected: Mapping[str, Array],
    candidate: Answer,
    probe: Probe,
    *,
    bound: Bound,
    name: str,
    precision: str,
    repeat: bool = True,
    sizes: Sequence[int] = (),
    doubt: str = "",
) -> Agreement:
    """Compare a candidate's answers with the expected ones.

    Args:
        expected: the reference's answers to the probe, by output name, float64.
        candidate: what is judged.
        probe: the images; both sides answered the same ones.
        bound: how far each output may be off.
        name: what the candidate is called in results.
        precision: in words.
        repeat: whether to run the candidate again, and with its rows moved by one, to see its noise.
        sizes: batches in which the images are judged once more, among others.
        doubt: makes a passing verdict provisional.

    Raises:
        MismatchError: outputs differ in name or shape.
        InconclusiveError: two runs of the candidate differ by more than half the bound.
        ContractError: the reference is not finite or empty, or its input was changed.
    """
    images = probe.images.copy()
    got = {key: np.array(out, np.float64) for key, out in candidate(images).items()}
    _same_shapes(expected, got, name, len(probe.names))
    if not np.array_equal(images, probe.images):
        raise ContractError(f"{name} changed its input")
    rows, undecidable = [], []
    for output, ref in expected.items():
        limit = bound.rel_l2[output]
        for index, image in enumerate(probe.names):
            row, close = _judge(image, output, ref[index], got[output][index], limit)
            rows.append(row)
            undecidable.append(close)
    for size in sizes:
        if size > len(probe.names):
            rows += _in_batch(expected, candidate, probe, bound, size)
    passed = all(r.share <= 1 for r in rows)
    return Agreement(
        name=name,
        precision=precision,
        rows=tuple(rows),
        bound=bound,
        signal=signal(expected),
        noise=_noise(candidate, got, probe, bound, name) if repeat and passed else None,
        undecidable=float(np.mean(undecidable)),
        doubt=doubt,
    )


def signal(expected: Mapping[str, Array]) -> float:
    """Return how much two images differ in the answers, relative, for the output where it is least."""
    gaps = [
        _ratio(float(np.linalg.norm(out[0] - out[1])), float(np.linalg.norm(out[0])))
        for out in expected.values()
        if len(out) > 1
    ]
    return min(gaps, default=math.nan)


def _judge(image: str, output: str, ref: Array, got: Array, limit: float) -> tuple[Row, bool]:
    off = np.abs(got - ref)
    scale = float(np.abs(ref).max())
    rel_l2 = _ratio(float(np.linalg.norm(off)), float(np.linalg.norm(ref)))
    peak = _ratio(float(off.max()), scale)
    share = share_of(rel_l2, peak, limit)
    top1, close = "", False
    if ref.ndim == 1 and len(ref) > 1:
        allowed = 2 * PEAK * limit * scale
        second, first = np.sort(ref)[-2:]
        close = bool(first - second <= allowed)
        chosen = int(got.argmax()) if np.isfinite(got).all() else -1
        same = chosen == int(ref.argmax())
        top1 = "same" if same else "tie" if chosen >= 0 and first - ref[chosen] <= allowed else "flip"
    return (
        Row(image=image, output=output, rel_l2=rel_l2, max_abs=float(off.max()), peak=peak, share=share, top1=top1),
        close,
    )


def share_of(rel_l2: float, peak: float, limit: float) -> float:
    """Return how much of its allowance an answer used; all of it and more where a number is missing."""
    if not (all(map(math.isfinite, (rel_l2, peak, limit))) and limit > 0):
        return math.inf
    return max(rel_l2 / limit, peak / (PEAK * limit))


def filled(images: Array, size: int) -> Array:
    """Return `size` unlike images that begin with those given; the others are these, turned along one side."""
    turns, rows = np.divmod(np.arange(size), len(images))
    return np.stack([np.roll(images[row], 5 * turn, axis=1) for turn, row in zip(turns, rows, strict=True)])


def _in_batch(expected: Mapping[str, Array], candidate: Answer, probe: Probe, bound: Bound, size: int) -> list[Row]:
    """Judge the images among others in one batch, and every place of the batch by its neighbour; the worst rows.

    The images of the probe are judged by what is expected. The batch is then moved on by one place: an
    image must be answered alike in both, so that all places answer as the judged ones do.
    """
    images = filled(probe.images, size)
    first = {key: np.array(out, np.float64) for key, out in candidate(images).items()}
    moved = {key: np.array(out, np.float64) for key, out in candidate(np.roll(images, 1, axis=0)).items()}
    found = []
    for output, ref in expected.items():
        limit, again = bound.rel_l2[output], np.roll(moved[output], -1, axis=0)
        rows = [
            _judge(f"{image} in a batch of {size}", output, ref[i], first[output][i], limit)[0]
            for i, image in enumerate(probe.names)
        ]
        rows += [
            _judge(f"place {i} of a batch of {size}, by its neighbour", output, first[output][i], again[i], limit)[0]
            for i in range(size)
        ]
        found.append(max(rows, key=lambda row: row.share))
    return found


def _noise(candidate: Answer, got: Mapping[str, Array], probe: Probe, bound: Bound, name: str) -> float:
    """Run again with the rows moved by one, and one row alone: no neighbour, time or batch size may matter."""
    moved = {key: np.array(out, np.float64) for key, out in candidate(np.roll(probe.images, 1, axis=0)).items()}
    alone = {key: np.array(out, np.float64) for key, out in candidate(probe.images[-1:].copy()).items()}
    noise = 0.0
    for output, first in got.items():
        again = np.roll(moved[output], -1, axis=0)
        worst = _worst([*_rel_l2(again, first), *_rel_l2(alone[output], first[-1:])])
        if not worst <= bound.rel_l2[output] / 2:
            raise InconclusiveError(
                f"{name}: {output} changes by {worst:.1e} when the batch is run again in another order or size, "
                f"more than half the limit {bound.rel_l2[output]:.1e}",
                "rows of the batch mix, or the runtime is not deterministic: try an export with --batch 1",
            )
        noise = max(noise, worst)
    return noise


def _same_shapes(expected: Mapping[str, Array], got: Mapping[str, Array], name: str, images: int) -> None:
    if not expected:
        raise ContractError("the reference has no output")
    for output, ref in expected.items():
        if ref.size == 0 or not np.isfinite(ref).all():
            raise ContractError(f"the reference's {output} is empty or not finite")
        if len(ref) != images:
            raise ContractError(f"the reference's {output} has {len(ref)} rows for {images} images")
    wanted = {output: ref.shape for output, ref in expected.items()}
    shapes = {output: out.shape for output, out in got.items()}
    if wanted != shapes:
        raise MismatchError(f"{name} answers {shapes}, the reference {wanted}", "compare files of the same network")


def _rel_l2(got: Array, ref: Array) -> list[float]:
    pairs = zip(got, ref, strict=True)
    return [_ratio(float(np.linalg.norm(g.astype(np.float64) - r)), float(np.linalg.norm(r))) for g, r in pairs]


def _worst(errors: Sequence[float]) -> float:
    """Return the largest error, NaN where there is one: `max` would keep or lose a NaN by its place."""
    return float(np.max(errors)) if errors else math.inf


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else (0.0 if part == 0 else math.inf)
