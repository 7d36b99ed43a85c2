"""Bare `replk`: the folder decides what comes next, and every command it names can be parsed."""

import os
import shlex
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from replk_deploy import cli, sources
from replk_deploy.advice import BENCH, FUSED, REJECTED, REPORT, RUNS, Advice, advise
from replk_deploy.errors import IntegrityError
from replk_deploy.metadata import Verdict
from replk_deploy.workspace import ROOT, Manifest, Workspace

VERDICT = Verdict(state="pass", content="c2e8", reference="47d0", worst=0.3, why="")
ONNX, HALF, LOWERED = "model.fp32.onnx", "model.fp16.safetensors", "lowered/model.fp32.ort-cpu-b1.onnx"
AOTI, NATIVE, BAD = "aoti/fused.pt2", "native/model.fp16.native", f"{REJECTED}/model.fp16.onnx.json"
STATES = {
    "fused": ([FUSED], "replk export --onnx"),
    "merged only": (["merged.safetensors"], "replk fuse CKPT"),
    "fusion rejected": ([f"{REJECTED}/{FUSED}.json"], "replk report"),
    "built from fused weights": ([FUSED, AOTI], "replk export --onnx"),
    "exported": ([FUSED, ONNX], "replk bench --backend ort-cpu"),
    "exported and lowered": ([FUSED, ONNX, LOWERED], "replk bench --backend ort-cpu"),
    "exported as weights": ([FUSED, HALF], "replk bench --backend torch"),
    "export rejected": ([FUSED, ONNX, BAD], "replk report"),
    "built": ([FUSED, HALF, NATIVE], "replk bench --backend native"),
    "timed": ([FUSED, ONNX, BENCH], "replk report"),
    "timed as weights": ([FUSED, HALF, BENCH], "replk report"),
    "reported": ([FUSED, ONNX, BENCH, REPORT], "replk profile --backend ort-cpu"),
    "reported, and then something rejected": ([FUSED, ONNX, BENCH, REPORT, BAD], "replk report"),
}


def run(folder: Path, *names: str) -> Workspace:
    """Make a run that holds these files, and let the manifest speak of those that are artefacts."""
    (folder / ROOT / folder.name).mkdir(parents=True)
    made = Workspace(folder / ROOT / folder.name)
    made.save()
    for name in names:
        made.path(name).parent.mkdir(exist_ok=True)
        made.path(name).write_text(name)
        if name not in {BENCH, REPORT} and not name.startswith(REJECTED):
            made.record(name, made_from={}, by="fuse", options={}, verdict=VERDICT)
    made.make_latest()
    return made


def shown() -> Advice:
    """Return the advice of the current folder, as the program prints it, each command one that it can parse."""
    advice, done = advise(Path()), CliRunner().invoke(cli.app, [])
    assert done.exit_code == 0
    assert advice.stands in done.stdout
    for command, _ in advice.commands:
        assert command in done.stdout
        _, name, *rest = shlex.split(command)
        typer.main.get_command(cli.app).commands[name].make_context(name, rest)  # type: ignore[attr-defined]
    return advice


def test_without_a_run_the_checkpoints_decide(in_empty_folder: Path) -> None:
    assert [command for command, _ in shown().commands] == [
        "replk deploy CKPT --data VAL",
        "replk inspect CKPT",
        "replk demo",
    ]
    (in_empty_folder / "my best.pth").write_bytes(b"x")
    assert shown().commands[0][0] == "replk fuse 'my best.pth'"
    run(in_empty_folder, "merged.safetensors")
    assert shown().commands[0][0] == "replk fuse 'my best.pth'"


@pytest.mark.parametrize("state", STATES)
def test_each_state_of_a_run_leads_to_the_next(state: str, in_empty_folder: Path) -> None:
    names, wanted = STATES[state]
    run(in_empty_folder, *names)
    advice = shown()
    assert advice.commands[0][0] == wanted
    commands = {command for command, _ in advice.commands}
    assert ("replk report" in commands) == (BENCH in names or any(name.startswith(REJECTED) for name in names))
    words = advice.stands.partition(": ")[2]
    assert ("timed" in words.split(", ")) == (BENCH in names)
    assert ("1 as ONNX" in words) == (ONNX in names), "a lowered file is no export"


def test_what_was_measured_after_the_report_is_reported_again(in_empty_folder: Path) -> None:
    made = run(in_empty_folder, *STATES["reported"][0])
    os.utime(made.path(REPORT), (1, 1))
    assert shown().commands[0][0] == "replk report"


def test_the_run_is_the_one_that_commands_go_on_with(in_empty_folder: Path) -> None:
    first = run(in_empty_folder, FUSED)
    other = Workspace(first.folder.with_name("other"))
    other.folder.mkdir()
    other.save()
    assert Workspace.latest().folder.name == first.name
    assert advise(Path()).stands.startswith(f"run {first.name}: ")
    (ROOT / "latest").write_text("gone\n")
    assert advise(Path()).stands.startswith("run other: ")


def test_a_damaged_manifest_is_said(in_empty_folder: Path) -> None:
    (run(in_empty_folder, FUSED).folder / "manifest.json").write_text("{")
    with pytest.raises(IntegrityError):
        advise(Path())
    assert CliRunner().invoke(cli.app, []).exit_code == IntegrityError.code


def test_names_are_those_of_the_run_folder() -> None:
    assert (RUNS, FUSED) == (ROOT, sources.FUSED)
    assert (Manifest.KIND, Manifest.FORMAT) == ("manifest", 1)
