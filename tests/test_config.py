"""The project's own file: what it says becomes a default, what nobody takes is refused by the nearest name."""

import json
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from replk_deploy import cli, config
from replk_deploy.config import Option
from replk_deploy.errors import Exit, ReplkError

COMMANDS = {
    "bench": {
        "backend": Option(parameter="backend", repeats=True),
        "precision": Option(parameter="precision", choices=("fp32", "fp16", "bf16")),
        "cold-l2": Option(parameter="cold_l2", switch=True),
    },
    "deploy": {
        "precision": Option(parameter="precision", repeats=True, choices=("fp32", "fp16", "bf16")),
        "data": Option(parameter="data", path=True),
    },
}


def said(folder: Path, text: str, name: str = config.FILE) -> dict[str, dict[str, object]]:
    (folder / name).write_text(text)
    path, found = config.choices(folder, COMMANDS)
    assert path == folder / name
    return found


def test_a_key_goes_to_every_command_that_takes_it_and_a_table_to_one(tmp_path: Path) -> None:
    text = 'precision = "fp16"\ndata = "val"\n[bench]\nprecision = "fp32"\ncold-l2 = true\nbackend = "torch"\n'
    assert said(tmp_path, text) == {
        "bench": {"precision": "fp32", "cold_l2": True, "backend": ["torch"]},
        "deploy": {"precision": ["fp16"], "data": str(tmp_path / "val")},
    }
    assert said(tmp_path, 'data = "-"') == {"deploy": {"data": "-"}}, "stdout is no file beside"
    assert said(tmp_path, 'precision = ["fp16", "fp32"]') == {"deploy": {"precision": ["fp16", "fp32"]}}
    assert said(tmp_path, "") == {}


def test_the_file_is_found_above_up_to_the_repository_and_shares_pyproject(tmp_path: Path) -> None:
    below = tmp_path / "repo" / "a" / "b"
    below.mkdir(parents=True)
    (tmp_path / config.FILE).write_text('precision = "bf16"')
    assert config.choices(below, COMMANDS)[0] == tmp_path / config.FILE
    (tmp_path / "repo" / ".git").mkdir()
    assert config.choices(below, COMMANDS) == (None, {}), "another project's file"
    shared = tmp_path / "repo" / config.SHARED
    shared.write_text("[tool.ruff]\nline-length = 3\n")
    assert config.choices(below, COMMANDS) == (None, {})
    shared.write_text("tool = 3\n")
    assert config.choices(below, COMMANDS) == (None, {})
    shared.write_text('[tool.replk.deploy]\ndata = "x.npz"\n')
    assert config.choices(below, COMMANDS) == (shared, {"deploy": {"data": str(shared.parent / "x.npz")}})
    (tmp_path / "repo" / "a" / config.FILE).write_text("")
    assert config.choices(below, COMMANDS)[0] == tmp_path / "repo" / "a" / config.FILE


@pytest.mark.parametrize(
    ("text", "problem", "remedy"),
    [
        ("precison = 'fp16'", "nothing is called precison", "did you mean precision?"),
        ("[bench]\nbackends = ['torch']", r"nothing is called \[bench\] backends", "did you mean backend?"),
        ("[bensh]\nbackend = ['torch']", r"nothing is called \[bensh\]", "did you mean bench?"),
        ("[bench]\ndata = 'val'", r"nothing is called \[bench\] data", "replk COMMAND --help"),
        ("[bench]\nprecision = ['fp16']", r"\[bench\] precision = \['fp16'\] is no value", "choose from fp32"),
        ("cold-l2 = 1", "cold-l2 = 1 is no value", "write true or false"),
        ("cold-l2 = 'yes'", "cold-l2 = 'yes' is no value", "write true or false"),
        ("[bench]\ncold-l2 = [true]", r"\[bench\] cold-l2 = \[True\] is no value", "write true or false"),
        ("precision = 'fp8'", "precision = 'fp8' is no value", "choose from fp32, fp16, bf16"),
        ("[deploy]\nprecision = ['fp32', 'fp8']", r"\[deploy\] precision = .* is no value", "choose from fp32"),
        ("[bench]\nbackend = true", r"\[bench\] backend = True is no value", "replk COMMAND --help"),
        ("precision = ", "cannot be read", "mend it"),
        ("\x00", "cannot be read", "mend it"),
    ],
)
def test_what_nobody_takes_is_refused(tmp_path: Path, text: str, problem: str, remedy: str) -> None:
    with pytest.raises(ReplkError, match=problem) as caught:
        said(tmp_path, text)
    assert remedy in caught.value.remedy
    assert str(tmp_path / config.FILE) in caught.value.problem


def test_every_option_of_every_command_can_be_written_there() -> None:
    group = typer.main.get_command(cli.app)
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        parameters = {p.name for p in command.params if p.param_type_name == "option"} - {"help"}
        options = cli._options_of(command)
        assert {option.parameter for option in options.values()} == parameters, name
        assert all(key == key.lstrip("-") for key in options)


def test_a_choice_is_known_whichever_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = {
        "precision": "fp8", "layout": "nhcw", "device": "tpu", "weights": "best", "cuda-graph": "yes"
    }  # fmt: skip
    for key, value in wrong.items():
        (tmp_path / config.FILE).write_text(f'{key} = "{value}"\n')
        done = CliRunner().invoke(cli.app, ["inspect", "missing.pth"])
        assert done.exit_code == Exit.USAGE
        assert f"{config.FILE}: {key} = '{value}' is no value that it takes" in done.stderr
        assert "fix   choose from " in done.stderr
        assert done.stderr.splitlines()[-1].startswith("ERROR replk: "), "no command was asked yet"
    (tmp_path / config.FILE).write_text('size = "64x96"\nmax-seconds = 3\nlower = ["none", "auto"]\nbatch = "1:8"\n')
    assert "missing.pth is not a file" in CliRunner().invoke(cli.app, ["inspect", "missing.pth"]).stderr


def test_the_command_line_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, object]] = []

    def inspect(path: Path, **given: object) -> None:
        seen.append(given | {"path": path})
        raise ReplkError("enough", "that was all")

    monkeypatch.setattr("replk_deploy.pipeline.inspect", inspect)
    monkeypatch.chdir(tmp_path)
    (tmp_path / config.FILE).write_text('size = 96\nweights = "ema"\n')
    for given, size in (([], (96, 96)), (["--size", "64x32"], (64, 32))):
        done = CliRunner().invoke(cli.app, ["inspect", "any.pth", *given])
        assert done.exit_code == Exit.USAGE
        assert f"choices from {tmp_path / config.FILE}: size, weights" in done.stderr.replace("\n", "")
        assert (seen[-1]["size"], seen[-1]["source"]) == (size, "ema")
    (tmp_path / config.FILE).write_text("sise = 96\n")
    done = CliRunner().invoke(cli.app, ["inspect", "any.pth", "--json", "-"])
    assert (done.exit_code, len(seen)) == (Exit.USAGE, 2)
    assert CliRunner().invoke(cli.app, []).exit_code == Exit.USAGE
    assert "did you mean size?" in done.stderr.replace("\n", " ")
    with pytest.raises(json.JSONDecodeError):
        json.loads(done.stdout)
