"""`replk lower`: an exported graph → the same graph with large convolutions in forms that a runtime runs fast."""

import dataclasses
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from replk_deploy import backends as runtimes
from replk_deploy import calibrate as calibrating
from replk_deploy import costs, files, graph, publish, sources, weights
from replk_deploy import lower as lowering
from replk_deploy import proof as proving
from replk_deploy.backends import cuda
from replk_deploy.backends.base import Backend, Engine
from replk_deploy.backends.ort import OrtCpu
from replk_deploy.batch import DYNAMIC, Batch
from replk_deploy.container import Source
from replk_deploy.costs import Calibration, Decision, Model
from replk_deploy.errors import IntegrityError, MismatchError, ReplkError
from replk_deploy.export import LIMIT_BYTES
from replk_deploy.forms import AUTO, Form
from replk_deploy.lower import Lowered
from replk_deploy.lowerings import LOWERINGS, NONE, counted
from replk_deploy.lowerings.base import LargeConv
from replk_deploy.lowerings.check import check_sites
from replk_deploy.metadata import Metadata, Verdict
from replk_deploy.pipeline import entries, exporting
from replk_deploy.pipeline.exporting import LOWERED
from replk_deploy.precision import TOLERANCES, Precision
from replk_deploy.progress import Progress, silent
from replk_deploy.proof import Oracle, Proof
from replk_deploy.workspace import ROOT, Workspace

GROWTH = 6.0  # times the fused weights, unless told otherwise
CHANNEL_MAJOR = frozenset({"ort-cuda"})  # runtimes that gain from keeping stretches of a graph channel by channel


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which form each large convolution of a network takes on a runtime, at a batch.

    Attributes:
        forms: by the name of the convolution.
        source: where the times came from that decided; empty where none did.
        decisions: for `auto` only.
    """

    form: Form
    runtime: str
    batch: int
    forms: Mapping[str, str]
    source: str
    decisions: tuple[Decision, ...]

    @property
    def changes(self) -> bool:
        """Tell whether any convolution takes another form."""
        return any(form != NONE for form in self.forms.values())

    @property
    def words(self) -> str:
        """Say how many take which form."""
        said = counted(self.forms.values())
        return f"{said} of {len(self.forms)}" if said else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoweredFile:
    """A lowered graph and what vouches for it; `errors` of each place that reads otherwise, alone, in float64."""

    KIND: ClassVar[str] = "lowered-file"
    FORMAT: ClassVar[int] = 1

    plan: Plan
    lowered: Lowered
    errors: Mapping[str, float]
    proof: Proof | None
    verdict: Verdict
    file: Path


def lower(
    artefact: Path | None = None,
    *,
    output: Path | None = None,
    form: Form = AUTO,
    backend: str = OrtCpu.name,
    batch: int | None = None,
    max_growth: float = GROWTH,
    precision: Precision | None = None,
    prove: bool = True,
    root: Path = ROOT,
    progress: Progress = silent,
) -> LoweredFile:
    """Lower the graph of a run or one ONNX file, in the run or at `output`, and judge it.

    Without a batch it is decided for the one that the file is fixed to, else for one image. A file that holds
    nothing to lower is copied as it is.

    Raises:
        ReplkError: a backend that starts from weights, which lowers when it opens them; no ONNX file; a map of
            unknown size.
    """
    kind = _demand_onnx(backend)
    if batch is not None and batch < 1:
        raise ReplkError(f"a batch of {batch} images is none", "give --batch 1 or more")
    if not max_growth >= 1:
        raise ReplkError(f"weights cannot become {max_growth:g} times as large", "give --max-weight-growth 1 or more")
    run, single = sources.run_or_file(artefact, root)
    if single and single.suffix != ".onnx":
        raise ReplkError(f"{single} is no ONNX file", "write one: replk export --onnx")
    if single:
        _demand_sound(single, prove=prove)
    source = single or exporting.needed(run, OrtCpu, precision, progress, any_verdict=not prove)
    root = run.folder.parent if run else root
    made = _planned(source, kind, _batch(source, batch), form, max_growth, root)
    if not made.forms:
        return _copy(source, made, output)
    return lower_file(
        source,
        made,
        run,
        output=output or (None if run else _beside(source, made)),
        oracle=sources.oracle_of(run, None) if run and prove else None,
        prove=prove,
        progress=progress,
    )


def _batch(source: Path, asked: int | None) -> int:
    """Return the batch to decide for.

    Raises:
        ReplkError: the file does not take it.
    """
    said = graph.header(source)
    stated = Batch.parse(said.batch) if said and said.batch else None
    if asked is None:
        return stated.max if stated and not stated.dynamic else 1
    if stated and not stated.holds(asked):
        raise ReplkError(f"{source} takes {stated} images at a time, not {asked}", "leave --batch out, or export again")
    return asked


def _copy(source: Path, made: Plan, output: Path | None) -> LoweredFile:
    """Give back a file in which nothing can be lowered, whatever vouches for it."""
    said = graph.header(source)
    if output:
        entries.spare(source, output)
        with files.staged(output) as part:
            shutil.copyfile(source, part)
            files.commit(part, output)
    verdict = said.verdict if said and said.verdict else publish.judged(None, graph.content_hash(source), "")
    nothing = Lowered(sites=(), chains=0, bytes_before=0, bytes_after=0)
    return LoweredFile(plan=made, lowered=nothing, errors={}, proof=None, verdict=verdict, file=output or source)


def export_lowered(
    artefact: Path | None = None,
    *,
    output: Path | None = None,
    form: Form,
    backend: str | None,
    source: Source = "model",
    head: str | None = None,
    precision: Precision = "fp32",
    size: sources.Size | None = None,
    batch: Batch = DYNAMIC,
    embed: bool = False,
    prove: bool = True,
    root: Path = ROOT,
    progress: Progress = silent,
) -> LoweredFile:
    """Export a network as ONNX and lower it for the batch that it is tuned for; with `output`, only that is kept.

    Raises:
        MismatchError: the portable file was rejected.
    """
    kind = _demand_onnx(backend or OrtCpu.name)
    if output and output.suffix != ".onnx":
        raise ReplkError(f"{output} does not end in .onnx", "leave out --onnx, or name a .onnx file")
    fused, run = exporting.fused_for(
        artefact, output, source=source, head=head, prove=prove, root=root, progress=progress
    )
    with tempfile.TemporaryDirectory() as folder:
        exported = exporting.export_fused(
            fused,
            run,
            output=Path(folder, output.name) if output else None,
            precision=precision,
            size=size,
            batch=batch,
            embed=embed,
            prove=prove,
            progress=progress,
        )
        if exported.verdict.state == "rejected":
            raise MismatchError(f"{exported.file} was rejected: {exported.verdict.why}", "do not deploy it")
        made = _planned(exported.file, kind, batch.opt, form, GROWTH, root)
        return lower_file(
            exported.file,
            made,
            run,
            output=output or (None if run else _beside(exported.file, made)),
            oracle=fused.oracle if prove else None,
            prove=prove,
            progress=progress,
        )


def lower_file(
    source: Path,
    made: Plan,
    run: Workspace | None,
    *,
    output: Path | None = None,
    oracle: Oracle | None = None,
    prove: bool = True,
    progress: Progress = silent,
) -> LoweredFile:
    """Lower one ONNX file as planned, and judge it: by the float64 network if there is one, else by that file."""
    name, metadata = _name(source, made), graph.header(source)
    final = output or (run.path(name) if run else Path(name))
    if final.suffix != ".onnx":
        raise ReplkError(f"{final} does not end in .onnx", "name a .onnx file with -o")
    entries.spare(source, final)
    if output:
        entries.spare_runs(output)
    with files.staged(final) as part:
        progress("lower", 0, 2)
        merge = made.runtime in CHANNEL_MAJOR
        by_name = None if made.form == AUTO else made.form  # so that it says why a form does not apply
        lowered = lowering.lower_graph(source, part, lambda site: by_name or made.forms[site.name], channel_major=merge)
        errors = check_sites(source, part)
        progress("lower", 1, 2)
        if metadata:
            words = ", ".join(filter(None, (metadata.lowered, made.words)))  # it may have been lowered before
            metadata = dataclasses.replace(metadata, lowered=words, verdict=None)
            graph.seal(part, metadata)
        proof = publish.seen("lower", lambda: _judge(source, part, oracle, errors, lowered)) if prove else None
        verdict = publish.judged(proof, graph.content_hash(part), oracle.sha256 if oracle else "")
        if metadata:
            graph.seal(part, dataclasses.replace(metadata, verdict=verdict))
        file = publish.place(part, final, verdict, run)
    progress("lower", 2, 2)
    done = LoweredFile(plan=made, lowered=lowered, errors=errors, proof=proof, verdict=verdict, file=file)
    if run and not output:
        made_from = {source.name: files.sha256(source)}
        entries.enter(run, name, done, made_from=made_from, by="lower", options=_options(made, prove=prove))
    return done


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What a portable file holds that a plan depends on, whatever the runtime and the batch; found once a file.

    Attributes:
        sites: that can take a form; none where nothing is asked to.
        weight_bytes: of the whole file.
    """

    file: Path
    form: Form
    sites: tuple[LargeConv, ...]
    precision: Precision
    weight_bytes: int


def survey(file: Path, form: Form) -> Survey:
    """Look through a portable file for what can take a form.

    Raises:
        ReplkError: not a whole file, or a form by name for a map of unknown size.
    """
    sites = () if form == NONE else _sites(file, form)
    precision: Precision = _precision(file) if sites else "fp32"
    return Survey(file=file, form=form, sites=sites, precision=precision, weight_bytes=_bytes(file) if sites else 0)


def needed(
    seen: Survey,
    kind: type[Backend],
    run: Workspace | None,
    *,
    batch: int,
    folder: Path,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    oracle: Oracle | None = None,
    prove: bool = True,
    root: Path = ROOT,
    progress: Progress = silent,
) -> tuple[Path, Plan | None]:
    """Return the file that a runtime is given for a batch, and the plan behind it; None where nothing changes.

    A backend that starts from weights keeps its file, and takes the plan with its settings.

    Args:
        seen: what was found in the portable file, for the form that was asked for.
        kind: the runtime.
        run: keeps what is made; without one it goes into `folder`.
        batch: images at a time.
        folder: for what is not kept.
        device: where it will run, as in Settings.
        oracle: the float64 network, where it is at hand.
        prove: whether to judge what is made; else it is unverified.
        root: folder of the runs, where a calibration of this machine may lie.
        progress: told while it is made.

    Raises:
        MismatchError: the lowered file was rejected.
    """
    source = seen.file
    if not seen.sites or not _lowers(kind, seen.form):
        return source, None
    root = run.folder.parent if run else root
    made = plan(
        seen.sites,
        kind,
        device=calibrating.device_name("cpu") if device == "cpu" else _device(kind),
        precision=seen.precision,
        batch=batch,
        form=seen.form,
        weight_bytes=seen.weight_bytes,
        max_growth=GROWTH,
        root=root,
    )
    if not made.changes:
        return source, None
    if source.suffix != ".onnx":
        return source, made
    name = _name(source, made)
    made_from = {source.name: files.sha256(source)}
    if run and any(run.fresh(name, made_from, _options(made, prove=judged)) for judged in {True, prove}):
        return run.take(name), made
    output = None if run else folder / Path(name).name
    done = lower_file(source, made, run, output=output, oracle=oracle, prove=prove, progress=progress)
    if done.verdict.state == "rejected":
        raise MismatchError(f"{done.file} was rejected: {done.verdict.why}", "do not deploy it")
    return done.file, made


def _lowers(kind: type[Backend], form: Form) -> bool:
    """Tell whether a backend takes other forms than what a file holds; ReplkError when one is asked for by name."""
    chosen = kind.ingredients if issubclass(kind, Engine) else kind.honours
    if kind.takes == "onnx" or "forms" in chosen:
        return True
    if form in {AUTO, NONE}:
        return False
    raise ReplkError(f"{kind.name} runs large convolutions in kernels of its own, not as {form}", "leave --lower out")


def plan(
    sites: Sequence[LargeConv],
    kind: type[Backend],
    *,
    device: str,
    precision: Precision,
    batch: int,
    form: Form,
    weight_bytes: int,
    max_growth: float,
    root: Path,
) -> Plan:
    """Decide for each large convolution; `device` is the name of a GPU, or cpu."""
    if form != AUTO:
        able = {site.name: form == NONE or LOWERINGS[form].refusal(site) is None for site in sites}
        forms = {name: form if able[name] else NONE for name in able}
        _demand_growth(sites, forms, precision, weight_bytes, max_growth)
        return Plan(form=form, runtime=kind.name, batch=batch, forms=forms, source="", decisions=())
    model = Model(costs.calibrations(root), kind.name, device, precision)
    if kind.takes == "onnx":
        max_growth = min(max_growth, LIMIT_BYTES / max(weight_bytes, 1))
    decisions = costs.decide(
        sites, model, batch=batch, precision=precision, weight_bytes=weight_bytes, max_growth=max_growth
    )
    return Plan(
        form=form,
        runtime=kind.name,
        batch=batch,
        forms={decision.site.name: decision.form for decision in decisions},
        source=model.source,
        decisions=decisions,
    )


def _demand_growth(
    sites: Sequence[LargeConv], forms: Mapping[str, str], precision: Precision, weight_bytes: int, max_growth: float
) -> None:
    itemsize = TOLERANCES[precision].torch_dtype.itemsize
    added = sum(costs.added_elements(site, forms[site.name]) for site in sites)
    growth = 1 + added * itemsize / max(weight_bytes, 1)
    if growth > max_growth:
        raise ReplkError(
            f"the weights would be {growth:.1f} times as large, and {max_growth:g} are allowed",
            "take --lower auto, or raise --max-weight-growth of replk lower",
        )


def calibrate(
    artefact: Path | None = None,
    *,
    backend: str,
    batches: Sequence[int] = (1,),
    precision: Precision | None = None,
    root: Path = ROOT,
    progress: Progress = silent,
) -> tuple[Calibration, Path]:
    """Measure the large convolutions of a run or file on this machine, and keep it where `auto` looks first."""
    kind = runtimes.find(backend)
    if not batches or min(batches) < 1:
        raise ReplkError(f"batches {', '.join(map(str, batches))} are not all images", "give --batch 1 or more")
    if issubclass(kind, Engine):
        raise ReplkError(f"{backend} builds engines, and single layers are not timed so", "calibrate another backend")
    run, single = sources.run_or_file(artefact, root)
    source = single or exporting.needed(run, kind, precision, progress, any_verdict=True)
    sites = _sites(source, AUTO)
    if not sites:
        raise ReplkError(f"{source} has no large convolution on a map of known size", "name another file")
    found = calibrating.calibrate(kind, sites, batches=batches, precision=_precision(source), progress=progress)
    path = (run.folder.parent if run else root) / costs.FILE
    costs.add(path, found)
    return found, path


def _demand_onnx(backend: str) -> type[Backend]:
    """Return a backend that opens ONNX files or engines of them; ReplkError for any other."""
    kind = runtimes.find(backend)
    if kind.takes != "onnx":
        raise ReplkError(f"{backend} lowers weights when it opens them", f"time it: replk bench --backend {backend}")
    return kind


def _planned(source: Path, kind: type[Backend], batch: int, form: Form, max_growth: float, root: Path) -> Plan:
    """Decide for each large convolution of an ONNX file."""
    sites = lowering.find(source)
    return plan(
        sites,
        kind,
        device=_device(kind),
        precision=_precision(source) if sites else "fp32",
        batch=batch,
        form=form,
        weight_bytes=_bytes(source),
        max_growth=max_growth,
        root=root,
    )


def _beside(source: Path, made: Plan) -> Path:
    return source.with_name(Path(_name(source, made)).name)


def _demand_sound(source: Path, *, prove: bool) -> None:
    """Raise IntegrityError when a file of ours was rejected or, to prove anything by it, when no verdict speaks of it.

    A file of somebody else has no verdict, and what is made of it a provisional one.
    """
    metadata = graph.header(source)
    if metadata is None:
        return
    state = metadata.verdict.state if metadata.verdict else "unverified"
    if state == "rejected" or (prove and state == "unverified"):
        raise IntegrityError(
            f"{source} is {state}, so nothing can be proved by it",
            "export it again: replk export --onnx" if state == "rejected" else "export it without --no-verify",
        )
    if metadata.verdict and prove and metadata.verdict.content != graph.content_hash(source):
        raise IntegrityError(
            f"{source} is not the file that its verdict speaks of", "export it again: replk export --onnx"
        )


def _sites(source: Path, form: Form) -> tuple[LargeConv, ...]:
    """Find what can be lowered; on maps of unknown size nothing, unless a form is asked for by name."""
    if source.suffix == ".safetensors":
        model, metadata = weights.described(source)
        return lowering.find_network(model, metadata.preprocessing.size)
    return lowering.find(source, lenient=form == AUTO)


def _precision(source: Path) -> Precision:
    said: Metadata | None = sources.header(source)
    return said.precision if said else graph.precision_of(source)


def _bytes(source: Path) -> int:
    """Return the bytes of all weights; of a weights file, which holds nothing else, those of the file."""
    return lowering.weight_bytes(source) if source.suffix == ".onnx" else source.stat().st_size


def _device(kind: type[Backend]) -> str:
    """Return what calibrations call the device that a backend runs on here."""
    return calibrating.device_name("cpu" if kind.cpu_only or not cuda.available() else "cuda")


def _name(source: Path, made: Plan) -> str:
    """Return the name of a lowered file in a run; what was asked for by name is for no runtime in particular."""
    suffix = f"{made.runtime}-b{made.batch}" if made.form == AUTO else made.form
    return f"{LOWERED}/{source.stem}.{suffix}.onnx"


def _options(made: Plan, *, prove: bool) -> Mapping[str, Any]:
    return {"forms": dict(made.forms), "channel_major": made.runtime in CHANNEL_MAJOR, "proved": prove}


def _judge(source: Path, part: Path, oracle: Oracle | None, errors: Mapping[str, float], lowered: Lowered) -> Proof:
    """Judge each changed place alone and the whole graph, by the float64 network or else by what it was made from."""
    proof = proving.prove_file(oracle, part, edge="lower") if oracle else proving.prove_graphs(source, part)
    lost = [site.name for site in lowered.sites if site.changed and site.name not in errors]
    structure = (f"{len(lost)} changed places were not compared: {', '.join(lost[:3])}",) if lost else ()
    return dataclasses.replace(proof, edge="lower", modules=errors, structure=(*proof.structure, *structure))
