"""`replk bench`: what a run or file holds → latencies on runtimes, each judged just before."""

import contextlib
import dataclasses
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np

from replk_deploy import backends as runtimes
from replk_deploy import bench as benching
from replk_deploy import files, records, sources
from replk_deploy import proof as proving
from replk_deploy.backends import cuda, sidecar
from replk_deploy.backends.base import Array, Backend, Engine, Launch, Settings
from replk_deploy.backends.ort import OrtCpu
from replk_deploy.bench import Bench
from replk_deploy.errors import InconclusiveError, IntegrityError, MismatchError, ReplkError, UnavailableError
from replk_deploy.forms import AUTO, LOWERED, Form
from replk_deploy.lanes import Contestant
from replk_deploy.lowerings import LOWERINGS, NONE
from replk_deploy.measurement import row_name
from replk_deploy.metadata import Metadata
from replk_deploy.pipeline import building, lowering, racing
from replk_deploy.pipeline.lowering import Plan, Survey
from replk_deploy.precision import TOLERANCES, Precision
from replk_deploy.progress import Progress, silent
from replk_deploy.proof import Oracle
from replk_deploy.verify import Agreement
from replk_deploy.workspace import ROOT, Workspace

Graphs = Literal["auto", "on", "off"]
GRAPHS: dict[Graphs, tuple[bool, ...]] = {"auto": (False, True), "on": (True,), "off": (False,)}
ROTATE = 4  # distinct inputs that take turns


@dataclass(frozen=True, slots=True, kw_only=True)
class Benched:
    """Latencies, and how far each timed backend was from the float64 network just before.

    `unverified` names the backends whose artefact no passing verdict speaks of.
    """

    KIND: ClassVar[str] = "benched"
    FORMAT: ClassVar[int] = 1

    bench: Bench
    agreements: Mapping[str, Agreement]
    artefacts: Mapping[str, str]
    skipped: Mapping[str, str]
    unverified: tuple[str, ...] = ()


class _Runner(NamedTuple):
    """One network as one backend opens it for some batches, lowered or not; `portable` is what it was lowered from."""

    label: str
    kind: type[Backend]
    portable: Path
    path: Path
    plan: Plan | None
    batches: tuple[int, ...]
    metadata: Metadata | None
    oracle: Oracle | None
    verdict: Literal["pass", "unverified"]

    @property
    def key(self) -> str:
        """Name it by what tells it from the others."""
        return " ".join(filter(None, (self.label, self.kind.name)))


@dataclass
class _Found:
    """What could be entered into the race so far, and what could not."""

    contestants: list[Contestant] = field(default_factory=list)
    timed: list[tuple[Contestant, Backend, Array]] = field(default_factory=list)
    agreements: dict[str, Agreement] = field(default_factory=dict)
    artefacts: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    last: ReplkError | None = None
    surveys: dict[tuple[Path, Form], Survey] = field(default_factory=dict)

    def survey(self, file: Path, form: Form) -> Survey:
        """Return what a portable file holds, read once for all batches and runtimes."""
        if (file, form) not in self.surveys:
            self.surveys[file, form] = lowering.survey(file, form)
        return self.surveys[file, form]


def bench(
    artefact: Path | None = None,
    *,
    backends: Sequence[str],
    batches: Sequence[int] = (1,),
    baselines: Sequence[str] = (),
    forms: Sequence[Form] = (AUTO,),
    settings: Settings | None = None,
    cuda_graph: Graphs = "auto",
    max_seconds: float = 60.0,
    percentiles: tuple[int, ...] = (50, 90),
    idle_ms: float = 0.0,
    cold_l2: bool = False,
    allow_unverified: bool = False,
    precision: Precision | None = None,
    root: Path = ROOT,
    progress: Progress = silent,
) -> Benched:
    """Time an artefact on runtimes, lowered for each, and judged just before where its weights are at hand.

    What a run lacks for a backend is built and proved first. A row that fails while it is prepared or
    timed leaves the race; the others go on. A baseline runs on the backends that take its family.

    Raises:
        MismatchError: a backend answers wrongly.
        InconclusiveError: a wrong answer might pass.
        UnavailableError: a backend cannot run, or no row could be timed.
        ReplkError: a setting that no chosen backend honours, or a wrong source.
    """
    demand_batches(batches)
    benching.demand(percentiles, max_seconds)
    kinds = {name: runtimes.find(name) for name in backends}
    settings = settings or Settings()
    _demand_honoured(settings, cuda_graph, kinds)
    if cold_l2 and not cuda.available():
        raise ReplkError("--cold-l2 empties the cache of a GPU, and there is none here", "leave it out")
    for kind in kinds.values():
        kind.probe()
    erase = cuda.Eraser() if cold_l2 else None
    run, single = sources.run_or_file(artefact, root)
    if single:
        for kind in kinds.values():
            sources.check_kind(single, kind, sources.opens(kind))
    with contextlib.ExitStack() as opened:
        own = _runners(
            kinds, run, single, precision, batches, forms[0], allow_unverified=allow_unverified, progress=progress
        )
        runners = list(own)
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        found, base = _Found(), next(iter(kinds))
        for index, baseline in enumerate(baselines):
            peer = racing.Peer(baseline, progress)
            able = [runner for runner in own if peer.fits(runner.kind)]
            runners += [_baseline(peer, runner, folder, progress) for runner in able]
            if not able:
                found.failures[peer.label] = f"{', '.join(kinds)} cannot run it: name another --backend beside"
            elif not index:
                base = able[0].kind.name
        for runner in runners:
            for lowered in _lowered(
                found, runner, run if runner in own else None, forms, settings.device, folder, root, progress
            ):
                _enter_all(found, opened, lowered, settings, cuda_graph, idle_ms, erase, progress)
        if not found.contestants:
            raise found.last or ReplkError("there is nothing to time", "name a backend")
        models = {contestant.model for contestant in found.contestants}
        label = racing.label(baselines[0]) if baselines else "" if len(models) > 1 else None
        result = benching.measure(
            found.contestants,
            baseline=base if any(contestant.backend == base for contestant in found.contestants) else None,
            baseline_model=label if label in models else None,
            max_seconds=max_seconds,
            percentiles=percentiles,
            progress=progress,
        )
        for contestant, backend, images in found.timed:
            if contestant.name not in result.failures:
                _demand_same(backend, contestant.launches[0], images)
    if (baselines and label not in models) or result.baseline != base:  # what should divide is not there
        rows = tuple(dataclasses.replace(row, ratio=None) for row in result.rows)
        result = dataclasses.replace(result, rows=rows, baseline=base, baseline_model=label)
    benched = Benched(
        bench=dataclasses.replace(result, failures={**found.failures, **result.failures}),
        agreements=found.agreements,
        artefacts=found.artefacts,
        skipped={},
        unverified=tuple(runner.kind.name for runner in own if runner.verdict == "unverified"),
    )
    if run:
        files.write_text(run.path("results/bench.json"), records.to_json(benched.bench))
    return benched


def _enter_all(
    found: _Found,
    opened: contextlib.ExitStack,
    runner: _Runner,
    settings: Settings,
    cuda_graph: Graphs,
    idle_ms: float,
    erase: cuda.Eraser | None,
    progress: Progress,
) -> None:
    """Open, judge and enter one network on one backend in all its rows; what cannot run is noted, the rest goes on.

    Raises:
        MismatchError: it answers wrongly.
        InconclusiveError: a wrong answer might pass.
        IntegrityError: its file is not what it should be.
    """
    key, sha256 = runner.key, files.sha256(runner.path)
    if key in found.artefacts:  # lowered otherwise for other batches
        key += f" b{','.join(map(str, runner.batches))}"
    found.artefacts[key] = runner.path.name
    if runner.plan:
        settings = dataclasses.replace(settings, forms=tuple(runner.plan.forms.items()))
    try:
        for backend, graph, load_s in _open(opened, runner, settings, cuda_graph):
            if erase and backend.device != "cuda":
                raise ReplkError(f"--cold-l2 empties the cache of a GPU, and {key} runs on the CPU", "leave one out")
            facts = {"artefact": runner.path.name, "sha256": sha256, "verdict": runner.verdict}
            before = runner.metadata.lowered if runner.metadata else ""
            facts["lowering"] = (runner.plan.words if runner.plan else before) or backend.facts.get("lowering", NONE)
            agreement = _judge(key, runner, backend, progress)
            if agreement is not None:
                found.agreements[key] = agreement
                facts |= {"error": agreement.sentence, "judged_by": agreement.against}
                if not agreement.passed:
                    raise MismatchError(f"{key} answers wrongly: {agreement.sentence}", "do not deploy it")
                if not runner.label:  # of a network that is only compared with, nothing is deployed
                    proving.demand_signal(agreement)
            for count in runner.batches:
                images = [
                    proving.probe_for(backend, runner.metadata, count=count, seed=n).images for n in range(ROTATE)
                ]
                try:
                    entered = benching.enter(
                        backend,
                        images,
                        model=runner.label,
                        cuda_graph=graph,
                        idle_ms=idle_ms,
                        erase=erase,
                        load_s=load_s,
                    )
                    for turn in (0, -1):
                        _demand_same(backend, entered.launches[turn], images[turn])
                except (IntegrityError, MismatchError):
                    raise
                except ReplkError as exc:
                    graphed = graph if backend.device == "cuda" else None
                    found.failures[row_name(runner.label, backend.name, count, graphed)] = str(exc)
                    found.last = exc
                else:
                    entered = dataclasses.replace(entered, facts={**entered.facts, **facts})
                    found.contestants.append(entered)
                    found.timed.append((entered, backend, images[0]))
    except UnavailableError as exc:
        found.failures[key] = str(exc)
        found.last = exc


def _judge(key: str, runner: _Runner, backend: Backend, progress: Progress) -> Agreement | None:
    """Judge a backend by float64 where weights are at hand, else by the ONNX file on ONNX Runtime's CPU provider."""
    if runner.oracle is not None and runner.metadata is not None:
        progress(f"verify {key}", 0, None)
        return proving.judge_backend(key, runner.oracle, backend, runner.metadata, batches=runner.batches)
    if runner.path.suffix == ".onnx" and (backend.name != OrtCpu.name or runner.plan):
        progress(f"verify {key}", 0, None)
        proof = proving.prove_by_graph(runner.portable, backend, runner.metadata, batches=runner.batches)
        return proof.agreements[0]
    return None


def _demand_same(backend: Backend, launch: Launch, images: Array) -> None:
    """Raise MismatchError unless a launch that will be timed gives what the judged way gives."""
    launch.enqueue()
    launch.wait()
    row = TOLERANCES[backend.precision]
    for (name, judged), timed in zip(backend.run(images).items(), launch.answers(), strict=True):
        whole = float(np.linalg.norm(judged)) or 1.0
        off = float(np.linalg.norm(timed - judged)) / whole if timed.shape == judged.shape else math.inf
        if not off <= row.factor * row.typical:
            raise MismatchError(
                f"{backend.name} times something else than it answers: {name} is {off:.1e} off", "do not deploy it"
            )


def demand_batches(batches: Sequence[int]) -> None:
    """Raise ReplkError unless every batch holds an image."""
    wrong = [count for count in batches if count < 1]
    if wrong:
        raise ReplkError(f"a batch of {wrong[0]} images cannot be timed", "give 1 or more")


def _demand_honoured(settings: Settings, cuda_graph: Graphs, kinds: Mapping[str, type[Backend]]) -> None:
    asked = settings.made() | ({"cuda_graph"} if cuda_graph == "on" else frozenset())
    for name in sorted(asked):
        if not any(name in kind.honours for kind in kinds.values()):
            raise ReplkError(
                f"--{name.replace('_', '-')} means nothing to {', '.join(kinds)}", "leave it out, or name a backend"
            )


def _runners(
    kinds: Mapping[str, type[Backend]],
    run: Workspace | None,
    single: Path | None,
    precision: Precision | None,
    batches: Sequence[int],
    form: Form,
    *,
    allow_unverified: bool,
    progress: Progress,
) -> list[_Runner]:
    """Return a runner for each backend; `form` is for engines that have to be built."""
    oracle, found = sources.oracle_of(run, single), []
    for kind in kinds.values():
        path = single or building.needed(
            run, kind, precision, progress, any_verdict=allow_unverified, batches=batches, form=form
        )
        metadata = sources.vouched(path, allow_unverified=allow_unverified)
        verdict: Literal["pass", "unverified"] = (
            "unverified" if allow_unverified and not sources.sound(path) else "pass"
        )
        found.append(_Runner("", kind, path, path, None, tuple(batches), metadata, oracle, verdict))
    return found


def _lowered(
    found: _Found,
    runner: _Runner,
    run: Workspace | None,
    forms: Sequence[Form],
    device: Literal["auto", "cpu", "cuda"],
    folder: Path,
    root: Path,
    progress: Progress,
) -> Iterator[_Runner]:
    """Yield a runner in each form that was asked for; batches that take the same forms stay together.

    Where it is timed both as it is and lowered, the lowered rows are told apart by their label. An engine is what it
    was built as: it is yielded once, and a form that it is not leaves the race.
    """
    if issubclass(runner.kind, Engine):
        refused = {} if runner.label else {form: why for form in forms if (why := _otherwise(runner, form))}
        for form, why in refused.items():
            found.failures[f"{runner.key} --lower {form}"], found.last = str(why), why
        if len(refused) < len(set(forms)):
            yield runner
        return
    done = set[tuple[tuple[tuple[str, str], ...], int]]()
    for form in forms:
        ways: dict[tuple[tuple[str, str], ...], tuple[Path, Plan | None, list[int]]] = {}
        for count in runner.batches:
            try:
                path, plan = lowering.needed(
                    found.survey(runner.path, form),
                    runner.kind,
                    run,
                    batch=count,
                    folder=folder,
                    device=device,
                    oracle=runner.oracle,
                    root=root,
                    progress=progress,
                )
            except (MismatchError, IntegrityError, InconclusiveError):
                raise
            except ReplkError as exc:
                found.failures[f"{runner.key} --lower {form}"], found.last = str(exc), exc
                continue
            key = tuple(plan.forms.items()) if plan else ()
            if (key, count) not in done:
                ways.setdefault(key, (path, plan, []))[2].append(count)
                done.add((key, count))
        for path, plan, counts in ways.values():
            apart = "" if len(forms) == 1 or plan is None else LOWERED if form == AUTO else form
            label = " ".join(filter(None, (runner.label, apart)))
            yield runner._replace(label=label, path=path, plan=plan, batches=tuple(counts))


def _otherwise(runner: _Runner, form: Form) -> ReplkError | None:
    """Say that an engine was built with other forms than the one asked for; None when it was not, or for `auto`."""
    said = sidecar.read(runner.path)
    words = (runner.metadata.lowered if runner.metadata else "") or said.facts.get("lowering", NONE)
    held = {word for word in words.replace(",", "").split() if word in LOWERINGS} or {NONE}
    if form == AUTO or held == {form}:
        return None
    kind = runner.kind.name
    return ReplkError(
        f"{runner.path.name} was built with large convolutions as {words}, not as {form}",
        f"build it so: replk build --backend {kind} --lower {form}, or leave it as it is: --lower auto",
    )


def _baseline(peer: racing.Peer, beside: _Runner, folder: Path, progress: Progress) -> _Runner:
    """Return another network on the backend of ours, in the same precision."""
    precision = beside.metadata.precision if beside.metadata else "fp32"
    path, metadata = peer.write(beside.kind, precision, folder, progress)
    return _Runner(peer.label, beside.kind, path, path, None, beside.batches, metadata, peer.oracle, "pass")


def _open(
    opened: contextlib.ExitStack, runner: _Runner, settings: Settings, cuda_graph: Graphs
) -> Iterator[tuple[Backend, bool, float]]:
    """Open a file without and, where there is a GPU for it, with a CUDA graph, as far as both are asked for."""
    honoured, graphs = settings.only(runner.kind.honours), GRAPHS[cuda_graph]
    for graph in graphs if "cuda_graph" in runner.kind.honours else (False,):
        start = time.perf_counter()
        backend = opened.enter_context(runner.kind(runner.path, dataclasses.replace(honoured, cuda_graph=graph)))
        if graph and backend.device != "cuda":
            raise UnavailableError(f"{backend.name} runs on the CPU here, which has no CUDA graph", "--cuda-graph auto")
        yield backend, graph, time.perf_counter() - start
        if backend.device != "cuda":
            return
