"""`replk build`: an exported file → the engine of one runtime, judged where it can run, with its sidecar."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from replk_deploy import backends as runtimes
from replk_deploy import build as construction
from replk_deploy import files, machine, publish, records, sources
from replk_deploy import proof as proving
from replk_deploy.backends import sidecar
from replk_deploy.backends.base import Backend, Engine, Recipe
from replk_deploy.backends.sidecar import Sidecar
from replk_deploy.batch import DYNAMIC, Batch
from replk_deploy.errors import IntegrityError, MismatchError, ReplkError
from replk_deploy.forms import AUTO, Form
from replk_deploy.metadata import Verdict
from replk_deploy.pipeline import entries, exporting, lowering
from replk_deploy.precision import Precision
from replk_deploy.progress import Progress, silent
from replk_deploy.proof import Oracle, Proof
from replk_deploy.workspace import ROOT, Workspace


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """An engine and what vouches for it; `absent` says what this machine lacks to run it."""

    KIND: ClassVar[str] = "built"
    FORMAT: ClassVar[int] = 1

    sidecar: Sidecar
    proof: Proof | None
    verdict: Verdict
    absent: str
    file: Path


def build(
    artefact: Path | None = None,
    *,
    backend: str,
    output: Path | None = None,
    precision: Precision | None = None,
    recipe: Recipe | None = None,
    form: Form = AUTO,
    refit: Path | None = None,
    prove: bool = True,
    allow_unverified: bool = False,
    root: Path = ROOT,
    progress: Progress = silent,
) -> Built:
    """Build the engine of a backend from a run or one file, lowered for it, in the run or at `output`.

    Raises:
        ReplkError: the backend opens exported files as they are, or starts from another kind of file.
        IntegrityError: no verdict vouches for the file to start from.
    """
    kind = runtimes.find(backend)
    if not issubclass(kind, Engine):
        raise ReplkError(f"{backend} opens {sources.opens(kind)} files as they are", "nothing needs to be built for it")
    run, single = sources.run_or_file(artefact, root)
    if single:
        sources.check_kind(single, kind, sources.starts_from(kind))
    source = single or exporting.needed(run, kind, precision, progress, any_verdict=allow_unverified)
    if run is None and output is None:
        output = source.with_name(f"{source.stem}.{kind.name}{kind.suffix}")
    oracle = sources.oracle_of(run, single) if prove else None
    recipe, name = recipe or Recipe(), engine_name(kind, source)
    with tempfile.TemporaryDirectory() as folder:
        if refit is None:
            _doubt(source, allow_unverified=allow_unverified)  # the lowered file has a verdict of its own, or none
            source, recipe = _lowered(
                source, kind, run, recipe, form, Path(folder), oracle, root, progress, prove=prove
            )
            allow_unverified |= not prove
        return build_file(
            source,
            kind,
            run,
            name,
            output=output,
            oracle=oracle,
            recipe=recipe,
            refit=refit,
            prove=prove,
            allow_unverified=allow_unverified,
            progress=progress,
        )


def build_file(
    source: Path,
    kind: type[Engine],
    run: Workspace | None,
    name: str,
    *,
    output: Path | None = None,
    oracle: Oracle | None = None,
    recipe: Recipe,
    refit: Path | None = None,
    prove: bool = True,
    allow_unverified: bool = False,
    progress: Progress = silent,
) -> Built:
    """Build an engine from one file and judge it, by the float64 network where its weights are at hand.

    Args:
        source: the file, lowered or not.
        kind: of the engine.
        run: keeps it under `name`, unless there is an `output`.
        name: in a run.
        output: where to write instead.
        oracle: the float64 network.
        recipe: how to build.
        refit: an engine whose weights are replaced instead.
        prove: whether to judge it.
        allow_unverified: whether to take a file that no verdict vouches for.
        progress: told while it is built and judged.
    """
    doubt = _doubt(source, allow_unverified=allow_unverified)
    if refit is not None and recipe.made():
        raise ReplkError("a refitted engine keeps the recipe of the old one", "leave out all but --refit and -o")
    if refit is not None and sidecar.read(refit).backend != kind.name:
        raise ReplkError(f"{refit} was not built for {kind.name}", f"name an engine of {kind.name} with --refit")
    final = output or (run.path(name) if run else Path(name))
    if final.suffix != kind.suffix:
        raise ReplkError(f"{final} has no known ending", f"end it in {kind.suffix}")
    entries.spare(source, final)
    if refit is not None:
        entries.spare(refit, final)
    if output:
        entries.spare_runs(output)
    with files.staged(final) as part:
        made = construction.build(source, part, kind, recipe=recipe, refit=refit, progress=progress)
        sidecar.write(part, made.sidecar)
        try:
            proof = None
            if prove and not made.absent:
                proof = publish.seen("build", lambda: _judge(part, source, kind, oracle, progress))
                proof = dataclasses.replace(proof, doubt=proof.doubt or doubt)
            verdict = publish.judged(proof, sidecar.content(made.sidecar), oracle.sha256 if oracle else "")
            if proof is None and made.absent:
                verdict = dataclasses.replace(verdict, why=f"built for an absent device: {made.absent}")
        finally:
            sidecar.place(part).unlink(missing_ok=True)
        said = dataclasses.replace(made.sidecar, verdict=verdict)
        file = publish.place(part, final, verdict, run)
        sidecar.write(file, said)
    built = Built(sidecar=said, proof=proof, verdict=verdict, absent=made.absent, file=file)
    if run and not output:
        made_from = {source.name: said.source_sha256}
        entries.enter(run, name, built, made_from=made_from, by="build", options=_options(recipe, said.made_with))
    return built


def engine_name(kind: type[Engine], source: Path) -> str:
    """Return the name in a run of the engine made of a file."""
    return f"{kind.name}/{source.stem}{kind.suffix}"


def needed(
    run: Workspace | None,
    kind: type[Backend],
    precision: Precision | None,
    progress: Progress,
    *,
    any_verdict: bool,
    batches: Sequence[int] = (),
    form: Form = AUTO,
) -> Path:
    """Return the newest sound artefact of a run that a backend can open, making it when there is none."""
    source = exporting.needed(run, kind, precision, progress, any_verdict=any_verdict, batches=batches)
    if run is None or not issubclass(kind, Engine):
        return source
    name = engine_name(kind, source)
    if run.entry(name) and sidecar.place(run.path(name)).is_file():
        engine = run.take(name)
        said = sidecar.read(engine)
        fits = all(any(batch.holds(count) for batch in said.batches) for count in batches) or not said.batches
        if said.verdict.state == "pass" and _made_of(said.source_sha256, source, run) and fits:
            with contextlib.suppress(IntegrityError), kind(engine):  # another version or device: built again
                return engine
    oracle = sources.oracle_of(run, None)
    with tempfile.TemporaryDirectory() as folder:
        lowered, recipe = _lowered(source, kind, run, Recipe(), form, Path(folder), oracle, run.folder.parent, progress)
        built = build_file(
            lowered, kind, run, name, oracle=oracle, recipe=recipe, allow_unverified=any_verdict, progress=progress
        )
    if built.verdict.state == "rejected":
        raise MismatchError(f"{built.file} was rejected: {built.verdict.why}", "do not deploy it")
    return built.file


def _lowered(
    source: Path,
    kind: type[Engine],
    run: Workspace | None,
    recipe: Recipe,
    form: Form,
    folder: Path,
    oracle: Oracle | None,
    root: Path,
    progress: Progress,
    *,
    prove: bool = True,
) -> tuple[Path, Recipe]:
    """Return what to build from, lowered for the batch that the engine is tuned for, and how."""
    said = sources.header(source)
    stated = Batch.parse(said.batch) if said and said.batch else DYNAMIC
    batch = (recipe.batches or (stated,))[0].opt
    path, plan = lowering.needed(
        lowering.survey(source, form),
        kind,
        run,
        batch=batch,
        folder=folder,
        oracle=oracle,
        prove=prove,
        root=root,
        progress=progress,
    )
    if plan and kind.takes == "weights":
        recipe = dataclasses.replace(recipe, forms=tuple(plan.forms.items()))
    return path, recipe


def _made_of(sha256: str, source: Path, run: Workspace) -> bool:
    """Tell whether a file of this hash is the portable file, or one that the run holds lowered from it."""
    portable = files.sha256(source)
    known = [run.entry(name) for name in run.artefacts(source.suffix)]
    lowered = {e.sha256 for e in known if e and e.by == "lower" and e.made_from.get(source.name) == portable}
    return sha256 in {portable, *lowered}


def _judge(engine: Path, source: Path, kind: type[Engine], oracle: Oracle | None, progress: Progress) -> Proof:
    metadata = sources.header(source)
    with kind(engine) as backend:
        progress(f"verify {kind.name}", 0, None)
        if oracle is not None:
            return proving.prove_backend("build", oracle, backend, metadata)
        return proving.prove_by_graph(source, backend, metadata)


def _doubt(source: Path, *, allow_unverified: bool) -> str:
    """Say why an engine of this file is a doubtful one; empty when it is not.

    Raises:
        IntegrityError: no verdict vouches for the file, and nobody allowed that.
    """
    said = sources.header(source)
    state = said.verdict.state if said and said.verdict else None
    if state == "rejected" or (state not in {"pass", "provisional"} and not allow_unverified):
        raise IntegrityError(
            f"{source} {f'is {state}' if state else 'has no verdict'}",
            "export it with replk without --no-verify, or build it all the same with --allow-unverified",
        )
    return "" if state in {"pass", "provisional"} else f"no verdict vouches for {source.name}"


def _options(recipe: Recipe, made_with: Mapping[str, str]) -> Mapping[str, Any]:
    return {**records.plain(recipe), "made_with": {**machine.versions(), **made_with}}
