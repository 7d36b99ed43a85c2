"""How each edge of the chain is proved: which states, which images, against what.

The oracle is the network as trained, in float64. Two states are judged: the checkpoint as it is, and
a poisoned copy that goes through the same code, because a checkpoint may be too tame to show a bug.
A failed proof names the first block at fault.
"""

import contextlib
import dataclasses
import hashlib
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from replk_deploy import bisect as bisection
from replk_deploy import graph, tf32, verify
from replk_deploy.backends.base import Backend
from replk_deploy.backends.ort import OrtCpu
from replk_deploy.batch import Batch
from replk_deploy.bisect import Bisection, BlockAnswer
from replk_deploy.checkpoint import Loaded
from replk_deploy.errors import InconclusiveError, ReplkError
from replk_deploy.export import INPUT, Export, export
from replk_deploy.fuse import Level, batch_norms, fuse
from replk_deploy.metadata import Metadata, State
from replk_deploy.models.base import Network
from replk_deploy.models.reparam import Reparam
from replk_deploy.poison import poison, randomise
from replk_deploy.precision import ALGEBRA, TOLERANCES, Precision, on_cpu
from replk_deploy.preprocess import Preprocessing
from replk_deploy.progress import Progress, silent
from replk_deploy.verify import SIGNAL, Agreement, Probe, answer_of

SMALL = 64
RGB = 3  # channels of what networks of ours take
NO_BF16 = "no bfloat16 kernels in ONNX Runtime on a CPU: proved by the float32 twin of the same graph, rounded as it is"

NO_FLOAT64 = "the reference is no float64 network: name the checkpoint or the fused weights to have a proof"


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What one edge of the chain was put through, and what came of it.

    Attributes:
        agreements: one per state and precision.
        modules: relative error of each re-parameterised block alone, worst over map sizes.
        structure: what is wrong with the shape of the artefact; empty when nothing is.
        bisection: errors block by block, only after a failure.
        doubt: why the verdict is provisional, empty when it is not.
    """

    KIND: ClassVar[str] = "proof"
    FORMAT: ClassVar[int] = 1
    DERIVED: ClassVar[tuple[str, ...]] = ("state", "worst", "sentence")

    edge: str
    agreements: tuple[Agreement, ...]
    modules: Mapping[str, float]
    structure: tuple[str, ...]
    bisection: Bisection | None
    doubt: str = ""

    @property
    def state(self) -> State:
        """Return the verdict's word: the worst of all that was judged."""
        modules = all(error <= ALGEBRA for error in self.modules.values())
        if self.structure or not modules or not self.agreements or any(not a.passed for a in self.agreements):
            return "rejected"
        return "provisional" if self.doubt else "pass"

    @property
    def worst(self) -> float:
        """Return the largest share of any allowance that was used."""
        shares = [a.worst for a in self.agreements] + [e / ALGEBRA for e in self.modules.values()]
        return max((math.inf if math.isnan(s) else s for s in shares), default=math.inf)

    @property
    def sentence(self) -> str:
        """Say why, in words."""
        bad = [a for a in self.agreements if not a.passed]
        wrong = [n for n, e in self.modules.items() if not e <= ALGEBRA]
        said = [f"{a.name}: {a.sentence}" for a in bad[:1]] or [f"{n} alone is wrong" for n in wrong[:1]]
        said = [*self.structure, *said]
        if not said and not self.agreements:
            return "nothing was compared"
        if not said:
            return self.doubt or max(self.agreements, key=lambda a: a.worst).sentence
        return "; ".join(said + ([self.bisection.sentence] if self.bisection else []))


class Oracle:
    """A network in float64 that remembers its answers."""

    def __init__(self, model: Network, sha256: str) -> None:
        """Take the network; `sha256` is that of the file it came from."""
        self.model = model if next(model.parameters()).dtype == torch.float64 else cast(model, torch.float64)
        self.sha256 = sha256
        self._known: dict[bytes, Mapping[str, verify.Array]] = {}

    def answers(self, probe: Probe, preprocessing: Preprocessing | None = None) -> Mapping[str, verify.Array]:
        """Return the answers to a probe, computed once."""
        found = self._once("fp64", lambda: self.model, preprocessing, probe.images)
        broken = [name for name, out in found.items() if not np.isfinite(out).all()]
        if broken:
            raise ReplkError(
                f"the reference answers NaN or infinity in {', '.join(broken)}, even in float64",
                "its weights explode: take an earlier checkpoint of the run",
            )
        return found

    def eager(self, precision: Precision, preprocessing: Preprocessing | None = None) -> verify.Answer:
        """Return PyTorch at a precision, as a function that computes each answer once."""
        return lambda images: self._once(precision, lambda: eager_of(self.model, precision), preprocessing, images)

    def _once(
        self, kind: str, model: Callable[[], Network], preprocessing: Preprocessing | None, images: verify.Array
    ) -> Mapping[str, verify.Array]:
        key = repr((kind, images.shape, preprocessing)).encode() + images.tobytes()
        if key not in self._known:
            self._known[key] = answer_of(model(), preprocessing=preprocessing)(images)
        return self._known[key]


def prove_fusion(
    oracle: Oracle, stored: Network, *, level: Level, size: tuple[int, int], progress: Progress = silent
) -> Proof:
    """Prove that a fused network, as read back from its file, computes what the trained one does.

    Args:
        oracle: the network before fusion.
        stored: the fused network in float32.
        level: how far it was fused.
        size: height and width of two images of the checkpoint's state; the rest is judged at 64x64.
        progress: told after each comparison.

    Raises:
        InconclusiveError: the poisoned copy's output hardly depends on its input.
        MismatchError: shapes differ, or the checkpoint does not survive float32.
    """
    trained, small = oracle.model, (SMALL, SMALL)
    twin = poison(trained)
    progress("prove fusion", 0, 4)
    fused_twin, fused = fuse(twin, level=level).model, fuse(trained, level=level).model
    modules = {
        name: max(
            _alone(a.get_submodule(name), b.get_submodule(name)) for a, b in ((twin, fused_twin), (trained, fused))
        )
        for name, m in twin.named_modules()
        if isinstance(m, Reparam)
    }
    progress("prove fusion", 1, 4)
    special, natural = verify.special(small), verify.normal(size)
    agreements: list[Agreement] = []

    def judge(name: str, base: Oracle, exact: Network, rounded: Network, probe: Probe) -> None:
        """Judge the algebra in float64, and the float32 weights by what float32 costs."""
        expected, eager = base.answers(probe), answer_of(cast(base.model, torch.float32))
        fp32 = verify.calibrate(expected, eager, probe, "fp32", limit=probe is natural)
        for net, precision, bound in ((exact, "fp64", verify.algebra(fp32)), (rounded, "fp32", fp32)):
            agreements.append(
                verify.verify(
                    expected,
                    answer_of(net),
                    probe,
                    bound=bound,
                    name=f"{name}, {precision}",
                    precision=precision,
                    repeat=False,
                )
            )
        progress("prove fusion", 1 + len(agreements) // 2, 4)

    judge("poisoned", Oracle(twin, oracle.sha256), fused_twin, cast(fused_twin, torch.float32), special)
    if batch_norms(trained):
        demand_signal(agreements[0])
    judge("checkpoint, special images", oracle, fused, stored, special)
    judge(f"checkpoint, {size[0]}x{size[1]}", oracle, fused, stored, natural)
    proof = Proof(
        edge="fuse",
        agreements=tuple(agreements),
        modules=modules,
        structure=_structure(trained, stored, level),
        bisection=None,
    )
    if proof.state != "rejected":  # a wrong answer says more, with its block
        proof = dataclasses.replace(proof, structure=_misrounded(fused, stored))
    if not proof.structure and any(not agreement.passed for agreement in agreements):
        in_checkpoint = all(a.passed for a in agreements[:2]) and not all(a.passed for a in agreements)
        base, candidate = (trained, fused) if in_checkpoint else (twin, fused_twin)
        eager, fusion_right = None, all(a.passed for a in agreements if a.precision == "fp64")
        if in_checkpoint and fusion_right:  # its file is wrong
            candidate, eager = stored, bisection.blocks_of(cast(trained, torch.float32))
        images = torch.from_numpy(special.images[:2]).double()
        found = bisection.bisect(base, bisection.blocks_of(candidate), images, eager=eager)
        proof = dataclasses.replace(proof, bisection=found)
    return proof


def prove_onnx(
    oracle: Oracle,
    path: Path,
    made: Export,
    *,
    metadata: Metadata,
    folded: Network | None = None,
    progress: Progress = silent,
) -> Proof:
    """Prove that an ONNX file, run by ONNX Runtime, computes what the oracle does.

    Args:
        oracle: the network that the file stands for, float64.
        path: the file.
        made: what the file is.
        metadata: of the file.
        folded: the network that was exported; the file must hold exactly its tensors, rounded once.
        progress: told after each comparison.

    Raises:
        MismatchError: shapes differ, or the checkpoint does not survive the precision.
        InconclusiveError: the runtime's own noise is too large.
    """
    progress("prove ONNX", 0, 3)
    inside = metadata.preprocessing if made.embeds_preprocessing else None
    with open_onnx(path, made.precision) as backend:
        agreements = [judge_backend("checkpoint", oracle, backend, metadata, precision=made.precision)]
    progress("prove ONNX", 1, 3)
    twin = poison(oracle.model if batch_norms(oracle.model) else _rebuilt(oracle.model))
    folded_twin = fuse(twin).model
    with tempfile.TemporaryDirectory() as folder:
        twin_path = Path(folder) / "twin.onnx"
        export(folded_twin, twin_path, precision=made.precision, size=(SMALL, SMALL), batch=made.batch, embed=inside)
        progress("prove ONNX", 2, 3)
        special = verify.pictures((SMALL, SMALL), count=4) if inside else verify.special((SMALL, SMALL))
        poisoned = Oracle(twin, oracle.sha256)
        with open_onnx(twin_path, made.precision) as backend:
            agreements.append(
                judge_backend(
                    "poisoned",
                    poisoned,
                    backend,
                    metadata,
                    precision=made.precision,
                    probe=special,
                    limit=False,
                    sizes=(made.batch.max,),
                )
            )
        demand_signal(agreements[-1])
        proof = Proof(
            edge="export",
            agreements=tuple(agreements),
            modules={},
            structure=_not_held(path, folded, made.precision) if folded else (),
            bisection=None,
            doubt=agreements[0].doubt,
        )
        if any(not agreement.passed for agreement in agreements):
            base, where = (oracle, path) if not agreements[0].passed else (poisoned, twin_path)
            images = torch.from_numpy(verify.normal((SMALL, SMALL) if where == twin_path else made.size).images)
            eager = bisection.blocks_of(eager_of(base.model, on_cpu(made.precision)))
            candidate = _onnx_blocks(where, base.model, Path(folder), made.precision)
            found = bisection.bisect(base.model, candidate, images[:1].double(), eager=eager)
            proof = dataclasses.replace(proof, bisection=found)
    progress("prove ONNX", 3, 3)
    return proof


def prove_weights(oracle: Oracle, stored: Network, precision: Precision, *, size: tuple[int, int]) -> Proof:
    """Prove that cast weights, as read back, answer within what their precision costs."""
    precision = on_cpu(precision)
    probe = verify.normal(size)
    expected = oracle.answers(probe)
    bound = verify.calibrate(expected, oracle.eager(precision), probe, precision, limit=True)
    agreement = verify.verify(
        expected, answer_of(stored), probe, bound=bound, name="checkpoint", precision=precision, repeat=False
    )
    structure = (*_structure(oracle.model, stored, "full"), *_misrounded(fuse(oracle.model).model, stored))
    return Proof(edge="export", agreements=(agreement,), modules={}, structure=structure, bisection=None)


def prove_file(
    oracle: Oracle,
    path: Path,
    *,
    edge: str = "verify",
    preprocessing: Preprocessing | None = None,
    doubt: str = "",
    progress: Progress = silent,
) -> Proof:
    """Judge an ONNX file by a network that is not necessarily the one it was made from.

    Args:
        oracle: the network, float64.
        path: the file.
        edge: what is proved.
        preprocessing: of the network: a file that was made for another is rejected; None when it is not known.
        doubt: about the network.
        progress: told before and after.
    """
    metadata = graph.header(path)
    precision = metadata.precision if metadata else None
    with open_onnx(path, precision) as backend:
        progress("verify", 0, 1)
        found = prove_backend(
            edge, oracle, backend, metadata, precision=precision, preprocessing=preprocessing, doubt=doubt
        )
    if found.state != "rejected" and metadata and not metadata.lowered:
        held = {name: torch.from_numpy(array) for name, array in graph.weights(path).items()}
        found = dataclasses.replace(found, structure=_strayed(fuse(oracle.model).model, held, metadata.precision))
    elif found.state == "rejected" and not found.structure and precision:
        images = torch.from_numpy(verify.normal(_size_of(backend, metadata)).images[:1]).double()
        eager = bisection.blocks_of(eager_of(oracle.model, on_cpu(precision)))
        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(ValueError, KeyError, ReplkError):
            candidate = _onnx_blocks(path, oracle.model, Path(folder), precision)  # only a graph of ours has our names
            found = dataclasses.replace(found, bisection=bisection.bisect(oracle.model, candidate, images, eager=eager))
    progress("verify", 1, 1)
    return found


def prove_backend(
    edge: str,
    oracle: Oracle,
    backend: Backend,
    metadata: Metadata | None,
    *,
    precision: Precision | None = None,
    preprocessing: Preprocessing | None = None,
    doubt: str = "",
) -> Proof:
    """Judge an open backend by the float64 network, at the size that its artefact states."""
    agreement = judge_backend("checkpoint", oracle, backend, metadata, precision=precision, preprocessing=preprocessing)
    doubt = agreement.doubt or doubt
    return Proof(
        edge=edge,
        agreements=(dataclasses.replace(agreement, doubt=doubt),),
        modules={},
        structure=_other_pictures(metadata.preprocessing if metadata else None, preprocessing),
        bisection=None,
        doubt=doubt,
    )


def _other_pictures(said: Preprocessing | None, reference: Preprocessing | None) -> tuple[str, ...]:
    """Say in what the pictures differ for which two files were made; a size that a user chose may."""
    if said is None or reference is None:
        return ()
    rules = ["mean", "std", "resize", "crop_pct"]
    rules += ["size"] if said.said_by == reference.said_by == "checkpoint" else []
    off = [rule for rule in rules if getattr(said, rule) != getattr(reference, rule)]
    own, other = (", ".join(f"{rule} {getattr(side, rule)}" for rule in off) for side in (said, reference))
    return (f"it is for pictures of {own}, the reference for {other}",) if off else ()


def prove_pair(
    oracle: Oracle,
    other: Loaded,
    *,
    size: tuple[int, int],
    preprocessing: Preprocessing | None = None,
    doubt: str = "",
    progress: Progress = silent,
) -> Proof:
    """Judge one network by another, each as its file has it: answers, tensors once fused, and kind of pictures.

    Args:
        oracle: the one, float64.
        other: the other.
        size: height and width of two images; the rest is judged at 64x64.
        preprocessing: of the oracle, None when it is not known.
        doubt: about the oracle.
        progress: told before each comparison and at the end.
    """
    said = other.metadata
    precision = on_cpu(said.precision) if said else "fp32"
    eager = oracle.eager(precision)
    agreements = []
    natural = verify.normal(size)
    probes = {"special images, 64x64": verify.special((SMALL, SMALL)), f"{size[0]}x{size[1]}": natural}
    for done, (name, probe) in enumerate(probes.items()):
        progress("verify", done, len(probes))
        expected = oracle.answers(probe)
        bound = verify.calibrate(expected, eager, probe, precision, limit=probe is natural)
        agreements.append(
            verify.verify(
                expected, answer_of(other.model), probe, bound=bound, name=name, precision=precision, repeat=False
            )
        )
    progress("verify", len(probes), len(probes))
    found = Proof(
        edge="verify",
        agreements=tuple(agreements),
        modules={},
        structure=_other_pictures(said.preprocessing if said else None, preprocessing),
        bisection=None,
        doubt=doubt,
    )
    alike = oracle.model.geometry == other.model.geometry
    if alike and found.state != "rejected":
        wide = cast(other.model, torch.float64)
        structure = _strayed(fuse(oracle.model).model, fuse(wide).model.state_dict(), precision)
        wrong = [
            name
            for name, block in oracle.model.named_modules()
            if isinstance(block, Reparam) and not _alone(block, wide.get_submodule(name)) <= _spacing(precision)
        ]
        structure += (f"alone, {len(wrong)} blocks are wrong: {', '.join(wrong[:3])}",) if wrong else ()
        found = dataclasses.replace(found, structure=structure)
    elif alike and not found.structure:
        images = torch.from_numpy(verify.special((SMALL, SMALL)).images[:2]).double()
        candidate, blocks = bisection.blocks_of(other.model), bisection.blocks_of(eager_of(oracle.model, precision))
        found = dataclasses.replace(found, bisection=bisection.bisect(oracle.model, candidate, images, eager=blocks))
    return found


def prove_graphs(reference: Path, candidate: Path, *, progress: Progress = silent) -> Proof:
    """Judge one ONNX file by another; neither has a float64 answer, so a pass is provisional."""
    said = [graph.header(path) for path in (reference, candidate)]
    precisions = [m.precision if m else "fp32" for m in said]
    precision = max(precisions, key=lambda p: TOLERANCES[p].typical)
    with open_onnx(reference, precisions[0]) as first, open_onnx(candidate, precisions[1]) as second:
        progress("verify", 0, 1)
        agreement = _judge_by_graph(first, second, said[1] or said[0], on_cpu(precision))
    progress("verify", 1, 1)
    structure = _other_pictures(*(m.preprocessing if m else None for m in reversed(said)))
    return dataclasses.replace(_by_graph("verify", agreement), structure=structure)


def prove_by_graph(
    reference: Path,
    backend: Backend,
    metadata: Metadata | None,
    *,
    edge: str = "build",
    batches: Sequence[int] = (),
) -> Proof:
    """Judge an open backend by an ONNX file on ONNX Runtime's CPU provider; a pass is provisional."""
    precision = on_cpu(backend.precision) if backend.device == "cpu" else backend.precision
    with open_onnx(reference, backend.precision) as first:
        return _by_graph(edge, _judge_by_graph(first, backend, metadata, precision, batches))


def _by_graph(edge: str, agreement: Agreement) -> Proof:
    return Proof(edge=edge, agreements=(agreement,), modules={}, structure=(), bisection=None, doubt=agreement.doubt)


def _judge_by_graph(
    reference: Backend,
    candidate: Backend,
    metadata: Metadata | None,
    precision: Precision,
    batches: Sequence[int] = (),
) -> Agreement:
    probe = probe_for(reference, metadata)
    expected = {name: np.asarray(out, np.float64) for name, out in verify.any_batch(reference)(probe.images).items()}
    if not all(np.isfinite(out).all() for out in expected.values()):
        raise ReplkError("the reference graph answers NaN or infinity", "name a reference that works")
    row = TOLERANCES[precision]
    bound = verify.fixed(expected, row.factor * row.typical, f"{row.factor:g} x the usual {precision} error")
    agreement = verify.verify(
        expected,
        verify.any_batch(candidate),
        probe,
        bound=bound,
        name="graphs",
        precision=precision,
        sizes=sorted({*_sizes(candidate, metadata), *batches}),
        doubt=NO_FLOAT64,
    )
    return dataclasses.replace(agreement, against="the reference graph")


def judge_backend(
    name: str,
    oracle: Oracle,
    backend: Backend,
    metadata: Metadata | None,
    *,
    precision: Precision | None = None,
    probe: Probe | None = None,
    limit: bool = True,
    sizes: Sequence[int] | None = None,
    batches: Sequence[int] = (),
    preprocessing: Preprocessing | None = None,
) -> Agreement:
    """Judge an open backend by the float64 network.

    Args:
        name: what the candidate is called.
        oracle: the network.
        backend: open.
        metadata: of its artefact; tells preprocessing and size where the artefact leaves them open.
        precision: of the artefact, where the open file is its stand-in.
        probe: the images; by default two at the artefact's own size.
        limit: whether to refuse a network that does not survive the precision.
        sizes: batches in which the images are judged once more; by default those that the artefact is for.
        batches: more of them: those that will be timed.
        preprocessing: what pixels go through on the reference's side; by default what `metadata` says.
    """
    twin = precision == "bf16" != backend.precision
    precision = precision or backend.precision
    if backend.device == "cpu":
        precision = on_cpu(precision)
    inside = None
    if backend.input.dtype == "uint8":
        inside = preprocessing or (metadata.preprocessing if metadata else None)
        if inside is None:
            raise ReplkError(
                f"{name} takes uint8 images and does not say how it normalises them",
                "export it with: replk export --onnx --embed-preprocess",
            )
    probe = probe or probe_for(backend, metadata, channels=RGB)
    expected = oracle.answers(probe, inside)
    bound = verify.calibrate(expected, oracle.eager(precision, inside), probe, precision, limit=limit)
    return verify.verify(
        expected,
        verify.any_batch(backend),
        probe,
        bound=bound,
        name=name,
        precision=precision,
        sizes=sorted({*(_sizes(backend, metadata) if sizes is None else sizes), *batches}),
        doubt=NO_BF16 if twin else "",
    )


def _sizes(backend: Backend, metadata: Metadata | None) -> tuple[int, ...]:
    """Return the batches that an artefact is for: a fixed one, those of its profiles, or the one to tune for."""
    fixed = backend.input.shape[0]
    if fixed is not None:
        return (fixed,)
    if backend.batches:
        return tuple(sorted({size for batch in backend.batches for size in (batch.opt, batch.max)}))
    return (Batch.parse(metadata.batch).opt,) if metadata and metadata.batch else ()


@contextmanager
def open_onnx(path: Path, precision: Precision | None) -> Iterator[Backend]:
    """Open an ONNX file on ONNX Runtime's CPU provider; a bfloat16 one as its float32 twin."""
    with tempfile.TemporaryDirectory() as folder:
        runnable = path
        if precision == "bf16":
            runnable = Path(folder) / "twin32.onnx"
            graph.bfloat16_twin(path, runnable)
        with OrtCpu(runnable) as backend:
            yield backend


def probe_for(
    backend: Backend, metadata: Metadata | None, *, count: int = 2, seed: int = 0, channels: int | None = None
) -> Probe:
    """Make random images of the kind and size that an open backend takes, and of its channels unless told otherwise."""
    raw = backend.input.dtype == "uint8"
    make = verify.pictures if raw else verify.normal
    channels = channels or backend.input.shape[-1 if raw else 1] or RGB
    return make(_size_of(backend, metadata), count=count, seed=seed, channels=channels)


def _size_of(backend: Backend, metadata: Metadata | None) -> tuple[int, int]:
    stated = backend.input.shape[1:3] if backend.input.dtype == "uint8" else backend.input.shape[2:4]
    default = metadata.preprocessing.size if metadata else (224, 224)
    height, width = (s or d for s, d in zip(stated, default, strict=True))
    return height, width


def _alone(block: nn.Module, fused: nn.Module) -> float:
    """Return the worst relative error of what became of a block, on maps smaller than its kernel and larger than half.

    It is what lies in the fused network that is judged, not what was meant to: taps that no map of the
    network reaches are seen here alone.
    """
    conv = max((m for m in fused.modules() if isinstance(m, nn.Conv2d)), key=lambda m: m.kernel_size)
    half = conv.kernel_size[0] // 2
    rng = torch.Generator().manual_seed(conv.in_channels)
    worst = 0.0
    with torch.inference_mode():
        for height, width in ((1, 1), (3, 5), (half + 1, half + 2)):
            x = torch.randn(2, conv.in_channels, height, width, generator=rng).double()
            ref = block(x)
            error = float((fused(x) - ref).norm() / ref.norm())
            worst = max(worst, math.inf if math.isnan(error) else error)
    return worst


def _told(names: Sequence[str], what: str) -> tuple[str, ...]:
    """Say of how many something is true, the first three by name; nothing where there is none."""
    return (f"{len(names)} {what}: {', '.join(names[:3])}",) if names else ()


def _misrounded(exact: Network, stored: Network) -> tuple[str, ...]:
    """Name the tensors that are not the exact ones rounded once, or twice by way of float32."""
    wrong = []
    for name, value in exact.state_dict().items():
        rounded = stored.state_dict()[name]
        if not rounded.is_floating_point():
            wrong += [] if torch.equal(rounded, value) else [name]
            continue
        step = torch.finfo(rounded.dtype).eps * value.abs() + torch.finfo(rounded.dtype).smallest_normal
        if not ((rounded.double() - value).abs() <= step).all():
            wrong.append(name)
    return _told(wrong, "tensors are not the fused ones, rounded")


def _spacing(precision: Precision) -> float:
    """Return how far stored weights may be off: four spacings, and 32 of float32, in which others may have fused."""
    return 4 * torch.finfo(TOLERANCES[precision].torch_dtype).eps + 32 * torch.finfo(torch.float32).eps


def _strayed(exact: Network, held: Mapping[str, Tensor], precision: Precision) -> tuple[str, ...]:
    """Name the tensors with a row that is not that of the exact network within what storing it costs.

    Rows are output channels; their errors are relative to the row or to an average one, whichever is
    larger. Answers bound all this loosely: a low precision hides a wrong class, and taps that no map
    reaches change none.
    """
    allowed, wrong = _spacing(precision), []
    for name, value in exact.state_dict().items():
        if name not in held or held[name].shape != value.shape:
            wrong.append(name)
            continue
        want, got = (t.detach().double().reshape(len(t) if t.dim() else 1, -1) for t in (value, held[name]))
        size = want.norm(dim=1)
        if not ((got - want).norm(dim=1) <= allowed * size.clamp(min=float(size.square().mean().sqrt()))).all():
            wrong.append(name)
    return _told(wrong, "tensors are not those of the reference")


def _not_held(path: Path, folded: Network, precision: Precision) -> tuple[str, ...]:
    """Name the tensors of a network that an ONNX file does not hold to the bit; a low precision hides lesser errors."""
    held, lost = graph.tensors(path), []
    for name, tensor in cast(folded, precision).state_dict().items():
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        if (tuple(tensor.shape), hashlib.sha256(data).digest()) not in held:
            lost.append(name)
    return _told(lost, "tensors are not the fused ones, rounded")


def _structure(trained: Network, stored: Network, level: Level) -> tuple[str, ...]:
    left = batch_norms(stored)
    blocks = [n for n, m in stored.named_modules() if isinstance(m, Reparam)]
    small = sum(
        len([c for c in m.modules() if isinstance(c, nn.Conv2d)]) - 1
        for m in trained.modules()
        if isinstance(m, Reparam)
    )
    alone = sum(f.side == "alone" for f in trained.folds()) if trained.form != "folded" and level == "full" else 0
    wanted = sum(isinstance(m, nn.Conv2d) for m in trained.modules()) - small + alone
    found = sum(isinstance(m, nn.Conv2d) for m in stored.modules())
    findings = {
        f"{len(left)} BatchNorms left: {', '.join(left[:3])}": level == "full" and bool(left),
        f"{len(blocks)} branched blocks left: {', '.join(blocks[:3])}": bool(blocks),
        f"{found} convolutions, expected {wanted}": found != wanted,
    }
    return tuple(finding for finding, bad in findings.items() if bad)


def _onnx_blocks(path: Path, reference: Network, folder: Path, precision: Precision) -> BlockAnswer:
    """Return a function that runs one block of an ONNX file on its own."""
    if precision == "bf16":
        graph.bfloat16_twin(path, folder / "bisect32.onnx")
        path = folder / "bisect32.onnx"
    model = graph.load(path)
    extractor = onnx.utils.Extractor(model)
    names = list(reference.blocks())
    before = dict(zip(names[1:], names[:-1], strict=True)) | {bisection.HEAD: names[-1]}

    def answer(name: str, x: Tensor) -> Tensor:
        first = next((n.input[0] for n in model.graph.node if n.op_type == "Conv"), INPUT)
        source, result = before.get(name, first), name if name != bisection.HEAD else model.graph.output[-1].name
        part = folder / "block.onnx"
        onnx.save(extractor.extract_model([source], [result]), part)
        with OrtCpu(part) as backend:
            run = verify.any_batch(backend)
            (out,) = run(x.numpy().astype(np.float32)).values()
        return torch.from_numpy(out)

    return answer


def _rebuilt(model: Network) -> Network:
    """Return a training-form network of the same geometry with random weights."""
    return randomise(type(model).build(model.geometry, "training"))


def demand_signal(agreement: Agreement) -> None:
    """Refuse a comparison that would let the answer to one image pass for that to another.

    Raises:
        InconclusiveError: the answers to two images are hardly apart, or within twice the bound.
    """
    least = max(SIGNAL, *(2 * limit for limit in agreement.bound.rel_l2.values()))
    if not agreement.signal >= least:
        raise InconclusiveError(
            f"{agreement.name}: answers to two images differ by {agreement.signal:.1e} only, of {least:.1e} needed:"
            " the proof would be blind",
            "name weights whose head is trained",
        )


def eager_of(model: Network, precision: Precision) -> Network:
    """Return the network as PyTorch runs it at a precision: norms keep float32, as under automatic mixed precision.

    It is never a fused one: a bound that comes from the fusion under test would excuse its bugs.
    """
    found, norms = cast(model, precision), tuple(f"{name}." for name in batch_norms(model))
    kept = {
        name: t.float() for name, t in model.state_dict().items() if name.startswith(norms) and t.is_floating_point()
    }
    found.load_state_dict(kept, strict=False, assign=True)
    if precision == "tf32":
        tf32.emulate(found)
    return found.requires_grad_(requires_grad=False)


def cast(model: Network, to: torch.dtype | Precision) -> Network:
    """Return a network in another floating type; tensors that have it already are shared, never change them."""
    dtype = to if isinstance(to, torch.dtype) else TOLERANCES[to].torch_dtype
    state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in model.state_dict().items()}
    copy = type(model).empty(model.geometry, model.form)
    copy.load_state_dict(state, assign=True)
    return copy.requires_grad_(requires_grad=False).eval()
