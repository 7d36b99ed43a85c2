"""Bare `replk`: the folder decides what comes next, and every command it names can be parsed."""

import shlex
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from replk_deploy import cli
from replk_deploy.advice import BENCH, RUNS, advise
from replk_deploy.errors import IntegrityError
from replk_deploy.metadata import Verdict
from replk_deploy.workspace import ROOT, Manifest, Workspace

VERDICT = Verdict(state="pass", content="c2e8", reference="47d0", worst=0.3, why="")


def put(run: Workspace, name: str) -> None:
    """Enter a file into a run."""
    run.path(name).write_text(name)
    run.record(name, made_from={}, by="fuse", options={}, verdict=VERDICT)


def known(command: str) -> None:
    """Parse a command line as the program does, placeholders and all."""
    _, name, *rest = shlex.split(command)
    typer.main.get_command(cli.app).commands[name].make_context(name, rest, resilient_parsing=False)  # type: ignore[attr-defined]


def test_each_state_leads_to_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seen = []

    def shown() -> str:
        advice = advise(Path())
        done = CliRunner().invoke(cli.app, [])
        assert done.exit_code == 0
        assert advice.stands in done.stdout
        assert all(command in done.stdout for command, _ in advice.commands)
        for command, _ in advice.commands:
            known(command)
        seen.append(advice.stands)
        return advice.commands[0][0]

    assert shown() == "replk deploy CKPT --data VAL"
    (tmp_path / "my best.pth").write_bytes(b"x")
    assert shown() == "replk fuse 'my best.pth'"
    folder = tmp_path / ROOT / "some-run"
    folder.mkdir(parents=True)
    assert RUNS == ROOT
    assert (Manifest.KIND, Manifest.FORMAT) == ("manifest", 1)
    run = Workspace(folder)
    put(run, "fused.safetensors")
    run.make_latest()
    assert shown() == "replk export --onnx"
    put(run, "model.fp32.onnx")
    assert shown() == "replk doctor"
    run.path(BENCH).parent.mkdir()
    run.path(BENCH).write_text("{}")
    assert shown() == "replk profile --backend ort-cpu"
    assert len(set(seen)) == len(seen)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(IntegrityError):
        advise(Path())
    assert CliRunner().invoke(cli.app, []).exit_code == IntegrityError.code
