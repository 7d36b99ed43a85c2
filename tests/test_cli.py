"""The command line as it is typed: exit codes, one verdict line, and nothing a user must not see."""

import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import typer.main
from safetensors.torch import save_file
from typer.testing import CliRunner

from replk_deploy import __version__, options, pipeline, proof, render
from replk_deploy.backends.torch import Torch
from replk_deploy.cli import _options_of, app
from replk_deploy.errors import ContractError, Exit, UnavailableError
from replk_deploy.models import reparam
from replk_deploy.models.replknet import RepLKGeometry
from tests import networks

HERE = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("short_timing")
TINY = RepLKGeometry(
    channels=(4, 6), depths=(1, 1), kernels=(13, 7), small=3, dw_channels=(4, 6), ffn_channels=(8, 12), classes=10
)


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return networks.save_as_trained(networks.trained(TINY), tmp_path_factory.mktemp("ckpt") / "ckpt.pth")


@pytest.fixture(scope="module")
def typed(tmp_path_factory: pytest.TempPathFactory, ckpt: Path) -> tuple[Path, list[subprocess.CompletedProcess[str]]]:
    """The three lines of the first page, typed in a folder that holds nothing but the checkpoint."""
    folder = tmp_path_factory.mktemp("typed")
    shutil.copy(ckpt, folder)
    lines = (
        ("fuse", "ckpt.pth"),
        ("export", "--onnx"),
        ("bench", "--backend", "ort-cpu", "--max-seconds", "0.1"),
    )
    return folder, [process(folder, *line) for line in lines]


@pytest.fixture
def folder(typed: tuple[Path, list], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, and the current one."""
    shutil.copytree(typed[0], tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def process(folder: Path, *line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(HERE / "cli.py"), *line],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def ask(*line: str):
    return CliRunner().invoke(app, list(line), prog_name="replk", catch_exceptions=False)


def last(text: str) -> str:
    return text.rstrip("\n").rpartition("\n")[2]


def test_the_three_lines_of_the_first_page_work(typed: tuple[Path, list[subprocess.CompletedProcess[str]]]) -> None:
    folder, (fused, exported, timed) = typed
    for done, words in (
        (fused, r"PASS fuse RepLKNet-test fp32 · worst 0\.\d\d of allowance · replk-out/.*/fused\.safetensors"),
        (exported, r"PASS export fp32 · worst 0\.\d\d of allowance · replk-out/.*/model\.fp32\.onnx"),
        (timed, r"PASS bench ort-cpu b1 [\d.]+ ms.*"),
    ):
        assert done.returncode == 0, done.stderr
        assert re.fullmatch(words, last(done.stdout)), done.stdout
        assert "Traceback" not in done.stderr
        assert "Warning" not in done.stderr
        assert done.stderr.replace("·", "").strip(), "progress is told on stderr"
    assert "--max-seconds 0.1 is too short to settle" in timed.stderr
    assert "stages" not in fused.stdout
    assert re.search(r"ort-cpu b1 +│ +[\d.]+", timed.stdout)
    names = {p.name for p in folder.rglob("*") if p.is_file()}
    assert {"latest", "manifest.json", "fused.safetensors", "model.fp32.onnx", "bench.json"} <= names
    assert not [n for n in names if n.endswith(".part")]


def test_trt_is_a_third_answer_with_its_install_line(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    done = process(folder, "bench", "--backend", "trt")
    assert done.returncode == 5
    assert "replk-deploy[trt]" in done.stderr
    assert "pip install" in done.stderr
    assert last(done.stderr).startswith("ERROR bench: ")
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert sorted(folder.rglob("*")) == before


def test_help_waits_for_no_runtime() -> None:
    heavy = ("torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "scipy", "PIL", "sklearn")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({heavy!r}));"
        "from replk_deploy.cli import main; sys.argv = ['replk', *sys.argv[1:]]; main()"
    )
    for line in (("--help",), ("bench", "--help"), ("--version",)):
        done = subprocess.run(
            [sys.executable, "-c", code, *line], cwd=HERE, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


@pytest.mark.parametrize(
    "line", [("inspect", "ckpt.pth"), ("inspect", "ckpt.pth", "--json", "-"), ("--help",), ("--version",)], ids=" ".join
)
def test_an_output_that_nobody_takes_is_told_by_the_exit_code(typed: tuple[Path, list], line: tuple[str, ...]) -> None:
    reader, gone = os.pipe()
    os.close(reader)
    full = os.open("/dev/full", os.O_WRONLY)
    for place, code, words in ((gone, Exit.PIPE, ""), (full, Exit.USAGE, "No space left on device")):
        done = subprocess.run(
            [sys.executable, HERE / "cli.py", *line],
            cwd=typed[0], stdout=place, stderr=subprocess.PIPE, text=True, check=False, timeout=60,
        )  # fmt: skip
        os.close(place)
        assert done.returncode == code, done.stderr
        assert words in done.stderr
        assert not re.search("Traceback|Broken|ignored", done.stderr)
        assert code == Exit.PIPE or last(done.stderr).startswith("ERROR replk: the output cannot be written")


@pytest.mark.parametrize("target", ["ckpt.pth", "out", "report.txt"])
def test_a_record_is_never_written_over_something_else(folder: Path, target: str) -> None:
    before = (folder / "ckpt.pth").read_bytes()
    done = ask("inspect", "ckpt.pth", "--json", target)
    assert done.exit_code == Exit.USAGE
    done = ask("verify", "ckpt.pth", "ckpt.pth", "--junit", target)
    assert done.exit_code == Exit.USAGE
    assert (folder / "ckpt.pth").read_bytes() == before
    assert not (folder / "report.txt").exists()


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_read(in_empty_folder: Path) -> None:
    endings = ("html", "json", "md", "xml")
    for ending in endings:
        Path(f"folder.{ending}").mkdir()
    Path("file").write_text("")
    commands = typer.main.get_command(app).commands
    reads = {"data", "refit", "timing-cache"}
    asked = [
        (command, option)
        for command in sorted(commands)
        for option, said in _options_of(commands[command]).items()
        if said.path and option not in reads
    ]
    assert {option for _, option in asked} == {"output", "json", "junit", "html", "markdown"}
    for command, option in asked:
        ending = {"junit": "xml", "html": "html", "markdown": "md"}.get(option, "json")
        for place in (f"folder.{ending}", f"file/new.{ending}"):
            done = ask(command, f"--{option}", place)
            assert done.exit_code == Exit.USAGE, (command, option)
            assert done.stderr.startswith(f"error {place} "), (command, option, done.stderr)
    assert sorted(p.name for p in in_empty_folder.iterdir()) == ["file", *(f"folder.{ending}" for ending in endings)]


def test_a_request_to_end_is_an_interrupt_that_leaves_nothing(tmp_path: Path) -> None:
    ckpt = networks.save_as_trained(networks.trained(TINY), tmp_path / "ckpt.pth")
    code = (
        "import os, signal\nfrom replk_deploy import cli, proof\n"
        "proof.prove_fusion = lambda *a, **k: os.kill(os.getpid(), signal.SIGTERM) or __import__('time').sleep(9)\n"
        "import sys; sys.argv = ['replk', 'fuse', 'ckpt.pth', '-o', 'out.safetensors']; cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == Exit.INTERRUPTED, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == [ckpt.name]


def test_an_interrupt_is_130_and_leaves_nothing(in_empty_folder: Path, ckpt: Path, monkeypatch) -> None:
    def interrupted(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(proof, "prove_fusion", interrupted)
    done = ask("fuse", str(ckpt))
    assert done.exit_code == 130
    assert "interrupted" in done.stderr
    assert not [p for p in in_empty_folder.rglob("*") if p.is_file()]


@pytest.mark.usefixtures("in_empty_folder")
def test_a_bug_of_ours_keeps_its_traceback(ckpt: Path, monkeypatch) -> None:
    def broken(*_args: object, **_kwargs: object) -> None:
        raise ContractError("a promise is broken")

    monkeypatch.setattr(pipeline, "fuse", broken)
    with pytest.raises(ContractError):
        ask("fuse", str(ckpt))
    done = CliRunner().invoke(app, ["fuse", str(ckpt)])
    assert done.exit_code == 1


@pytest.mark.usefixtures("in_empty_folder")
def test_no_memory_is_unavailable_and_says_so(ckpt: Path, monkeypatch) -> None:
    def broken(*_args: object, **_kwargs: object) -> None:
        raise MemoryError

    monkeypatch.setattr(pipeline, "fuse", broken)
    done = ask("fuse", str(ckpt))
    assert done.exit_code == 5
    assert "memory" in done.stderr
    assert last(done.stderr).startswith("ERROR fuse")


def test_help_names_the_commands_and_version_is_one_line() -> None:
    helped = ask("--help")
    assert all(c in helped.output for c in ("inspect", "fuse", "export", "verify", "bench", "deploy", "selftest"))
    assert helped.exit_code == 0
    shown = ask("--version")
    assert (shown.exit_code, shown.stdout) == (0, f"replk {__version__}\n")


# --- JSON ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "schema"),
    [
        (("inspect", "ckpt.pth"), "replk.inspection/1"),
        (("fuse", "ckpt.pth", "-o", "f.safetensors"), "replk.fused/1"),
        (("export", "-o", "w.safetensors", "--precision", "fp16"), "replk.exported/1"),
        (("verify", "ckpt.pth", "ckpt.pth"), "replk.proof/1"),
        (("bench", "--backend", "ort-cpu", "--max-seconds", "0.01"), "replk.bench/2"),
    ],
)
def test_json_on_stdout_is_one_document_and_the_verdict_stands_beside(
    folder: Path, line: tuple[str, ...], schema: str
) -> None:
    done = ask(*line, "--json", "-")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["schema"] == schema
    assert last(done.stderr).startswith(f"PASS {line[0]}")
    written = ask(*line, "--json", "deep/result.json")
    assert json.loads((folder / "deep/result.json").read_text())["schema"] == schema
    assert last(written.stdout).startswith(f"PASS {line[0]}")
    assert '"schema"' not in written.stdout


@pytest.mark.usefixtures("folder")
def test_a_json_file_that_cannot_be_written_is_a_refusal() -> None:
    done = ask("inspect", "ckpt.pth", "--json", "ckpt.pth/x.json")
    assert done.exit_code == 2
    assert last(done.stderr).startswith("ERROR inspect: ")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("report --html ckpt.pth", "does not end in .html"),
        ("report --html RUN/fused.safetensors", "does not end in .html"),
        ("report --markdown same.html", "does not end in .md"),
        ("report --json RUN/manifest.json", "belongs to the run"),
        ("verify ckpt.pth RUN/model.fp32.onnx --json RUN/results/model.fp32.onnx.json", "belongs to the run"),
        ("export --onnx --json RUN/results/model.fp32.onnx.json", "belongs to the run"),
        ("fuse ckpt.pth -o one.json --json=./one.json", "is named twice"),
        ("compare one.json one.json --json one.json", "is named twice"),
        ("compare . . --json one.json", "holds a record of another kind, replk.bench"),
    ],
)
def test_no_output_replaces_what_is_needed(folder: Path, line: str, said: str) -> None:
    (run,) = {path.parent for path in folder.rglob("manifest.json")}
    (folder / "one.json").write_text('{"schema": "replk.bench/2"}')
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    done = ask(*line.replace("RUN", str(run.relative_to(folder))).split())
    assert (done.exit_code, said in done.output.replace("\n", " ")) == (2, True), done.output
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_each_command_with_a_record_says_which_it_writes() -> None:
    commands = typer.main.get_command(app).commands
    assert {n for n, c in commands.items() if any("--json" in p.opts for p in c.params)} == set(options.WRITES)


# --- verdicts -----------------------------------------------------------------------------------------------------


def test_a_rejected_fusion_is_3_and_says_which_block(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = reparam.embed_kernel
    monkeypatch.setattr(reparam, "embed_kernel", lambda small, size: honest(small, size).roll(1, -2))
    done = ask("fuse", "ckpt.pth", "-o", "f.safetensors")
    assert done.exit_code == 3
    assert re.fullmatch(r"FAIL fuse .* · worst [\d.]+ of allowance · f\.rejected\.safetensors", last(done.stdout))
    assert "first wrong block: stages.0.blocks.0" in done.stdout
    assert not (folder / "f.safetensors").exists()
    done = ask("fuse", "ckpt.pth", "-o", "f.safetensors", "--json", "-")
    assert done.exit_code == 3
    assert json.loads(done.stdout)["verdict"]["state"] == "rejected"
    assert last(done.stderr).startswith("FAIL fuse")


def test_another_network_is_3(folder: Path) -> None:
    networks.save_as_trained(networks.trained(TINY, seed=4), folder / "other.pth")
    (model,) = folder.rglob("model.fp32.onnx")
    done = ask("verify", "other.pth", str(model))
    assert done.exit_code == 3
    assert re.fullmatch(r"FAIL verify other\.pth and model\.fp32\.onnx · worst [\d.]+ of allowance", last(done.stdout))


@pytest.mark.usefixtures("folder")
def test_unverified_is_said_and_then_refused_with_6() -> None:
    done = ask("fuse", "ckpt.pth", "-o", "f.safetensors", "--no-verify")
    assert done.exit_code == 0
    assert last(done.stdout) == "UNVERIFIED fuse RepLKNet-test fp32 · f.safetensors"
    for line in (
        ("export", "f.safetensors", "--onnx", "-o", "m.onnx"),
        ("bench", "f.safetensors", "--backend", "torch"),
    ):
        done = ask(*line)
        assert done.exit_code == 6, line
        assert last(done.stderr).startswith(f"ERROR {line[0]}: f.safetensors ")
        assert "fix" in done.stderr
    done = ask("bench", "f.safetensors", "--backend", "torch", "--allow-unverified", "--max-seconds", "0.01")
    assert done.exit_code == 0
    assert last(done.stdout).startswith("UNVERIFIED bench torch b1 "), "what nothing vouches for is no pass"


def test_an_altered_run_is_6(folder: Path) -> None:
    (fused,) = folder.rglob("fused.safetensors")
    fused.write_bytes(fused.read_bytes()[:-1] + b"\x01")
    done = ask("export", "--onnx")
    assert done.exit_code == 6
    assert "its hash differs" in done.stderr


def test_already_fused_is_said(folder: Path) -> None:
    (fused,) = folder.rglob("fused.safetensors")
    done = ask("fuse", str(fused), "-o", "again.safetensors")
    assert done.exit_code == 0
    assert "already fused" in done.stdout
    assert last(done.stdout).startswith("PASS fuse")


@pytest.mark.usefixtures("folder")
def test_deploy_shows_the_whole_chain() -> None:
    done = ask("deploy", "ckpt.pth", "--backend", "ort-cpu", "--max-seconds", "0.01", "--size", "64")
    assert done.exit_code == 0
    assert re.fullmatch(r"PASS deploy RepLKNet-test · replk-out/[\w-]+/report\.html", last(done.stdout))
    for part in ("fused.safetensors", "model.fp32.onnx", "large kernels", "latency", "taken from the run as it was"):
        assert part in done.stdout


@pytest.mark.usefixtures("folder")
def test_deploy_ends_as_bench_does_where_a_backend_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise UnavailableError("the device is gone", "find it")

    monkeypatch.setattr(Torch, "_run", broken)
    two = ("--backend", "ort-cpu", "--backend", "torch", "--max-seconds", "0.01")
    done = ask("deploy", "ckpt.pth", *two, "--size", "64", "--junit", "j.xml")
    assert done.exit_code == ask("bench", *two).exit_code == Exit.UNAVAILABLE
    assert re.fullmatch(
        r"ERROR deploy RepLKNet-test · replk-out/[\w-]+/report\.html · 1 rows failed", last(done.stdout)
    )
    assert "the device is gone" in Path("j.xml").read_text(encoding="utf-8")


# --- refusals -----------------------------------------------------------------------------------------------------


class Dangerous:
    def __reduce__(self) -> tuple[object, ...]:
        return print, ("code of the file ran",)


def _saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "hello")
    return file.getvalue()


def _lost(state: dict[str, torch.Tensor]) -> bytes:
    return _saved({k: v for k, v in state.items() if k != "stages.1.blocks.0.pw1.conv.weight"})


def _broken(state: dict[str, torch.Tensor]) -> bytes:
    return _saved({k: v * float("nan") if k == "stem.0.conv.weight" else v for k, v in state.items()})


REFUSED = {
    "empty": lambda _s: b"",
    "text": lambda _s: b"hello, this is no checkpoint",
    "cut short": lambda s: _saved(s)[:2000],
    "not a torch archive": lambda _s: _zip(),
    "code": lambda _s: pickle.dumps(Dangerous()),
    "code in an archive": lambda s: _saved({**s, "extra": Dangerous()}),
    "a list": lambda _s: _saved([1, 2]),
    "no tensors": lambda _s: _saved({"model": {}}),
    "another network": lambda _s: _saved({"layer1.0.conv1.weight": torch.ones(4, 4, 3, 3)}),
    "a tensor lost": _lost,
    "a stray tensor": lambda s: _saved({**s, "stages.0.blocks.0.pw9.weight": torch.ones(1)}),
    "a misshaped tensor": lambda s: _saved({**s, "norm.weight": torch.ones(5)}),
    "NaN": _broken,
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_checkpoint_that_cannot_be_taken_is_2_without_a_traceback(
    in_empty_folder: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    state = networks.trained(TINY).state_dict()
    (in_empty_folder / "bad.pth").write_bytes(REFUSED[kind](state))
    done = ask("fuse", "bad.pth")
    assert done.exit_code == 2, done.output
    assert "error" in done.stderr
    assert "fix" in done.stderr
    assert last(done.stderr).startswith("ERROR fuse: bad.pth ")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert "code of the file ran" not in capfd.readouterr().out
    assert [p.name for p in in_empty_folder.rglob("*")] == ["bad.pth"]


@pytest.mark.usefixtures("in_empty_folder")
def test_a_missing_checkpoint_and_a_foreign_safetensors_are_2() -> None:
    save_file({"weight": torch.ones(2)}, "foreign.safetensors")
    for path in ("missing.pth", "missing.safetensors", "foreign.safetensors", "."):
        done = ask("inspect", path)
        assert done.exit_code == 2, path
        assert last(done.stderr).startswith("ERROR inspect: ")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (("fuse", "ckpt.pth", "--level", "half"), "choose full or merge"),
        (("fuse", "ckpt.pth", "--weights", "best"), "choose model or ema"),
        (("fuse", "ckpt.pth", "--weights", "ema"), "no averaged weights"),
        (("fuse", "ckpt.pth", "--head", "in22k"), "no head named 'in22k'"),
        (("fuse", "ckpt.pth", "--size", "0"), "is not a size"),
        (("fuse", "ckpt.pth", "--size", "64x"), "is not a size"),
        (("fuse", "ckpt.pth", "--size", "64x0"), "is not a size"),
        (("inspect", "ckpt.pth", "--size", "3"), "too small"),
        (("export", "--onnx", "--size", "3"), "too small"),
        (("fuse", "ckpt.pth", "--size", "-8"), "is not a size"),
        (("fuse", "ckpt.pth", "-o", "x.bin"), "no known ending"),
        (("export", "--precision", "int8"), "choose from fp32, tf32, fp16, bf16"),
        (("export", "--onnx", "--batch", "0"), "is not a batch"),
        (("export", "--onnx", "--batch", "8:1"), "is not a batch"),
        (("export", "--onnx", "--batch", "1:2:3:4"), "is not a batch"),
        (("export", "--onnx", "--batch", "-1"), "is not a batch"),
        (("export", "--onnx", "--batch", "two"), "is not a batch"),
        (("export", "--embed-preprocess"), "add --onnx"),
        (("export", "nowhere"), "nowhere"),
        (("bench", "--backend", "ort"), "there is no backend 'ort'"),
        (("bench", "--backend", "ort-cpu", "--percentile", "75"), "choose from 50, 90, 99"),
        (("bench", "--backend", "ort-cpu", "--batch", "0"), "give 1 or more"),
        (("bench", "--backend", "ort-cpu", "--batch", "-2"), "give 1 or more"),
        (("deploy", "ckpt.pth", "--bench-batch", "0"), "give 1 or more"),
        (("deploy", "ckpt.pth", "--precision", "fp8"), "choose from fp32, tf32, fp16, bf16"),
        (("deploy", "ckpt.pth", "--data", "nowhere.npz"), "nowhere.npz"),
    ],
)
def test_a_value_that_cannot_be_taken_is_2_and_says_what_can(folder: Path, line: tuple[str, ...], words: str) -> None:
    done = ask(*line)
    assert done.exit_code == 2, done.output
    assert words in " ".join(done.stderr.split())
    assert last(done.stderr).startswith(f"ERROR {line[0]}: ")
    assert "Traceback" not in done.output
    assert not list(folder.rglob("*.part"))


@pytest.mark.parametrize(
    "line", [("fuse",), ("fuze", "x"), ("fuse", "a", "--nope"), ("bench",), ("verify", "a"), ("inspect", "a", "--size")]
)
def test_a_line_that_cannot_be_parsed_is_2(line: tuple[str, ...]) -> None:
    done = ask(*line)
    assert done.exit_code == 2
    assert "Traceback" not in done.output


@pytest.mark.usefixtures("in_empty_folder")
def test_without_a_run_the_way_to_begin_is_shown() -> None:
    for line in (("export", "--onnx"), ("bench", "--backend", "ort-cpu")):
        done = ask(*line)
        assert done.exit_code == 2
        assert "replk fuse CHECKPOINT" in done.stderr


# --- terminals ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("columns", [20, 60, 100, 250])
@pytest.mark.parametrize("line", [("inspect", "ckpt.pth"), ("verify", "ckpt.pth", "ckpt.pth")])
def test_no_width_loses_the_verdict(monkeypatch, columns: int, line: tuple[str, ...]) -> None:
    monkeypatch.setattr(render.out, "_width", columns)
    monkeypatch.setattr(render.err, "_width", columns)
    done = ask(*line)
    assert done.exit_code == 0
    assert last(done.stdout).startswith(f"PASS {line[0]} ")
    if columns >= 60:
        assert "…" not in done.stdout
        assert max(map(len, done.stdout.splitlines()[:-1])) <= max(columns, 76)


def test_colour_is_only_for_terminals_and_never_with_no_color(folder: Path) -> None:
    done = process(folder, "inspect", "ckpt.pth", COLUMNS="60")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout + done.stderr
    assert last(done.stdout).startswith("PASS inspect")
