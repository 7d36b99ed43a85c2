"""What CI systems are told: the verdict, whatever it is, in words that survive their formats."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree as ET

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from replk_deploy import ci, pipeline, records
from replk_deploy.backends import BACKENDS
from replk_deploy.ci import Case
from replk_deploy.cli import app
from replk_deploy.errors import ContractError, Exit, MismatchError, UnavailableError
from replk_deploy.precision import PRECISIONS
from tests import networks
from tests.test_compare import record, row

ROOT = Path(__file__).resolve().parent.parent
TEXT = st.text(max_size=60)
CASES = st.lists(
    st.builds(Case, name=TEXT, found=TEXT, failure=TEXT)
    | st.builds(Case, name=TEXT, found=TEXT, doubt=TEXT)
    | st.builds(Case.stopped, TEXT, TEXT.filter(bool)),
    max_size=4,
)


def ask(*line: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in line])


def suite(path: Path) -> tuple[dict[str, str], list[str]]:
    """Read a file of JUnit: counts, and the names that failed."""
    root = ET.fromstring(path.read_text(encoding="utf-8"))
    kinds = {case.attrib["name"]: [part.tag for part in case if part.tag != "system-out"] for case in root[0]}
    failed = [name for name, kind in kinds.items() if kind]
    (inside,) = root
    counts = {"tests": len(kinds)}
    counts |= {f"{kind}s": sum([kind] == found for found in kinds.values()) for kind in ("failure", "error")}
    assert {key: int(inside.attrib[key]) for key in counts} == counts
    assert {key: int(root.attrib[key]) for key in counts} == counts
    return dict(inside.attrib), failed


def annotation(line: str) -> tuple[str, ...]:
    """Read a workflow command: its word, file, title and message."""
    found = re.fullmatch(r"::(error|warning|notice) file=([^:,\r\n]*),title=([^:,\r\n]*)::([^\r\n]*)", line)
    assert found, line
    return tuple(re.sub("%(25|0D|0A|3A|2C)", lambda m: unquote(m[0]), part) for part in found.groups())


def told(words: str) -> list[tuple[str, ...]]:
    """Read the annotations among other words, without their messages."""
    return [annotation(line)[:3] for line in words.splitlines() if line.startswith("::")]


@given(CASES)
def test_any_words_survive(cases: list[Case]) -> None:
    root = ET.fromstring(ci.junit("verify", cases))
    kinds = ["error" if c.error else "failure" if c.failure else "skipped" if c.doubt else "" for c in cases]
    kinds = kinds or ["failure"]
    names = [ci._text(c.name) for c in cases] or ["verify"]
    assert [c.attrib["name"] for c in root.iter("testcase")] == names
    found = [[part.tag for part in c if part.tag != "system-out"] for c in root.iter("testcase")]
    assert found == [[kind] if kind else [] for kind in kinds]
    counts = {"failures": kinds.count("failure"), "errors": kinds.count("error"), "skipped": kinds.count("skipped")}
    assert {name: int(root.attrib[name]) for name in counts} == counts

    lines = list(ci.annotations("verify", cases, about=ROOT / "a, b%2C.pth", workspace=ROOT))
    wrong = [c for c in cases if c.failure or c.doubt]
    assert len(lines) == (len(wrong) or 1)
    for line, case in zip(lines, wrong, strict=False):
        assert annotation(line) == (
            "error" if case.failure else "warning",
            "a, b%2C.pth",
            f"replk verify: {case.name}",
            case.failure or case.doubt,
        )
    assert wrong or lines[0].startswith("::notice" if cases else "::error")

    table = ci.summary("verify", cases).split("\n\n", 1)[1].strip("\n").split("\n")
    assert len(table) == 2 + len(cases), "a line each"


def test_an_annotation_names_its_file_from_the_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, outside = tmp_path / "work" / "sub", tmp_path / "cache"
    inside.mkdir(parents=True)
    outside.mkdir()
    (inside / "linked.pth").symlink_to(outside / "blob")
    monkeypatch.chdir(inside)
    odd = "50%0A: a,b\r\n::error::.pth"
    for about, name in (
        ("x.pth", "sub/x.pth"),
        ("../x.pth", "x.pth"),
        ("linked.pth", "sub/linked.pth"),
        (odd, f"sub/{odd}"),
        (str(outside / "x.pth"), str(outside / "x.pth")),
    ):
        for cases in ([], [Case(name="a", found="", failure="b")], [Case(name="a", found="b")]):
            (line,) = ci.annotations("verify", cases, about=Path(about), workspace=tmp_path / "work")
            assert annotation(line)[1] == name
        own = [Case(name="a", found="", failure="b", file=about)]
        (line,) = ci.annotations("verify", own, about=Path("other"), workspace=tmp_path / "work")
        assert annotation(line)[1] == name


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("ci")
    made = (networks.save_as_trained(networks.trained(seed=n), folder / f"{n}.pth") for n in (0, 1))
    first, second = made
    return first, second


def test_a_verification_is_told_as_it_ended(
    checkpoints: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary, out = tmp_path / "summary.md", tmp_path / "new" / "junit.xml"
    one, other = checkpoints
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    monkeypatch.setenv("GITHUB_WORKSPACE", str(one.parent))

    done = ask("verify", one, one, "--junit", out, "--github")
    assert done.exit_code == Exit.OK, done.output
    counts, failed = suite(out)
    assert (counts["name"], failed, int(counts["tests"]) > 1) == ("verify", [], True)
    assert told(done.stderr) == [("notice", "0.pth", "replk verify")]
    assert summary.read_text().startswith("### replk verify: ")

    done = ask("verify", one, other, "--junit", out, "--github")
    assert done.exit_code == Exit.MISMATCH
    assert "verify" in suite(out)[1]
    wrong = [("error", "1.pth", f"replk verify: {name}") for name in suite(out)[1]]
    assert told(done.stderr) == wrong, "what is judged is at fault"
    assert summary.read_text().count("### replk verify: ") == 2
    assert "**failed**" in summary.read_text()

    done = ask("verify", one, tmp_path / "missing.onnx", "--junit", out, "--github")
    assert done.exit_code == Exit.USAGE
    assert suite(out)[1] == ["verify"], "what could not be asked has not passed"
    assert told(done.stderr) == [("error", str(tmp_path / "missing.onnx"), "replk verify: verify")]

    (tmp_path / "file").write_text("")
    done = ask("verify", one, one, "--junit", tmp_path / "file" / "junit.xml")
    assert done.exit_code == Exit.USAGE
    assert "cannot be written" in done.stderr


def test_a_summary_that_cannot_be_written_is_refused_before_the_work(
    checkpoints: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "junit.xml"
    for place in (tmp_path, tmp_path / "file" / "summary.md", tmp_path / "missing" / "summary.md"):
        monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(place))
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "verify", lambda *_, **__: pytest.fail("it has begun"))
            done = ask("verify", *checkpoints, "--github", "--junit", out)
        assert done.exit_code == Exit.USAGE, done.output
        assert f"GITHUB_STEP_SUMMARY names {place}" in done.stderr
        assert "\nfix " in done.stderr
        assert suite(out)[1] == ["verify"]
        out.unlink()
    assert ask("verify", checkpoints[0], checkpoints[0]).exit_code == Exit.OK, "nobody asked for GitHub"


STOPS = {
    "no backend": (UnavailableError("trt is not installed", "pip install tensorrt"), Exit.UNAVAILABLE, "pip install"),
    "no memory": (MemoryError(), Exit.UNAVAILABLE, "memory ran out"),
    "no memory on a GPU": (torch.OutOfMemoryError("CUDA out of memory. Tried"), Exit.UNAVAILABLE, "memory ran out"),
    "Ctrl-C": (KeyboardInterrupt(), Exit.INTERRUPTED, "interrupted"),
    "a bug": (ContractError("a promise is broken"), Exit.BUG, "ContractError: a promise is broken"),
}


@pytest.mark.parametrize("command", ["verify", "deploy", "compare"])
@pytest.mark.parametrize("stop", STOPS)
def test_what_stops_a_command_is_an_error_and_no_verdict(
    command: str, stop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, summary = tmp_path / "junit.xml", tmp_path / "summary.md"
    out.write_text("what an earlier run found")
    exc, code, words = STOPS[stop]

    def stopped(*_args: object, **_kwargs: object) -> None:
        assert suite(out)[0]["errors"] == "1", "whoever is killed here leaves no old verdict"
        raise exc

    monkeypatch.setattr(pipeline, command, stopped)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    monkeypatch.delenv("GITHUB_WORKSPACE", raising=False)
    files = ["x.pth"] if command == "deploy" else ["x.pth", "y.onnx"]
    done = ask(command, *files, "--junit", out, "--github")
    assert done.exit_code == code, done.output
    assert (suite(out)[0]["errors"], suite(out)[1]) == ("1", [command])
    assert words in out.read_text()
    assert told(done.stderr) == [("error", files[-1], f"replk {command}: {command}")]
    assert words in summary.read_text()


def test_a_mismatch_that_stops_a_deployment_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_args: object, **_kwargs: object) -> None:
        raise MismatchError("ort-cpu answers otherwise", "see the report")

    monkeypatch.setattr(pipeline, "deploy", stopped)
    out = tmp_path / "junit.xml"
    assert ask("deploy", "x.pth", "--junit", out).exit_code == Exit.MISMATCH
    counts, failed = suite(out)
    assert (counts["failures"], counts["errors"], failed) == ("1", "0", ["deploy"])


def test_a_comparison_fails_by_row(tmp_path: Path) -> None:
    out = tmp_path / "junit.xml"
    for name, ms in (("base", 10.0), ("same", 10.01), ("slower", 20.0)):
        (tmp_path / f"{name}.json").write_text(records.to_json(record(row(ms), row(5.0, batch=8))))
    base = tmp_path / "base.json"
    for name, code, failed in (("same", Exit.OK, []), ("slower", Exit.REGRESSION, ["torch b1"])):
        done = ask("compare", base, tmp_path / f"{name}.json", "--max-regress", "3%", "--junit", out)
        assert (done.exit_code, suite(out)[1]) == (code, failed), done.output
    (tmp_path / "less.json").write_text(records.to_json(record(row(10.0))))
    done = ask("compare", base, tmp_path / "less.json", "--max-regress", "3%", "--junit", out)
    assert (done.exit_code, suite(out)[1]) == (Exit.INCONCLUSIVE, ["torch b8"])
    done = ask("compare", base, tmp_path / "less.json", "--junit", out)
    assert (done.exit_code, suite(out)[1]) == (Exit.OK, [])


def test_a_deployment_is_a_case_for_each_file_and_each_backend() -> None:
    verdict = {"state": "pass", "why": ""}
    run = {
        "fuse": {"file": "out/fused.safetensors", "verdict": verdict},
        "exports": [{"file": "out/model.fp16.onnx", "verdict": {"state": "rejected", "why": "far off"}}],
        "bench": {
            "agreements": {
                "ort-cpu": {"state": "rejected", "sentence": "logits is NaN"},
                "torch": {"state": "pass", "sentence": "well"},
            },
            "bench": {"failures": {"openvino b8": "out of memory"}},
        },
        "problem": "nothing was timed",
        "code": Exit.UNAVAILABLE,
    }
    cases = ci.of_deployment(run)
    assert {c.name: c.failure for c in cases} == {
        "fused.safetensors": "",
        "model.fp16.onnx": "rejected: far off",
        "ort-cpu": "logits is NaN",
        "torch": "",
        "openvino b8": "out of memory",
        "deploy": "nothing was timed",
    }
    assert [c.name for c in cases if c.error] == ["openvino b8", "deploy"]
    assert [c.file for c in cases] == ["out/fused.safetensors", "out/model.fp16.onnx", "", "", "", ""]
    verdict["state"] = "provisional"
    doubted = ci.of_deployment(run | {"exports": [], "bench": None, "code": Exit.OK})
    assert [(c.failure, c.doubt) for c in doubted] == [("", "provisional"), ("", "nothing was timed")]


def snippet(page: str, key: str) -> Any:
    """Return the one example in YAML that begins with a key."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    (found,) = re.findall(rf"^```yaml\n({key}:.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return yaml.safe_load(found)


def installed(folder: Path) -> str:
    """Put `replk` and `python` into a folder, as an installation would; return the PATH that finds them first."""
    folder.mkdir()
    program = folder / "replk"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT / "cli.py"} "$@"\n')
    program.chmod(0o755)
    (folder / "python").symlink_to(sys.executable)
    return f"{folder}:{os.environ['PATH']}"


def test_the_hook_proves_a_pair_and_stops_at_a_wrong_one(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    assert hook.keys() >= {"id", "name", "entry", "language"}
    assert hook["pass_filenames"] is False, "two names are taken, and both are in args"
    (used,) = snippet("ci.md", "repos")["repos"][0]["hooks"]
    assert used["id"] == hook["id"]
    for pattern in (hook["files"], used["files"]):
        assert all(re.search(pattern, name) for name in used["args"])
    assert not re.search(hook["files"], "train.py")

    reference, judged = (tmp_path / name for name in used["args"])
    reference.parent.mkdir()
    path = installed(tmp_path / "bin")
    for trained, code in ((checkpoints[0], Exit.OK), (checkpoints[1], Exit.MISMATCH)):
        if not judged.exists():
            assert ask("export", trained, "--onnx", "--size", "64", "--no-verify", "-o", judged).exit_code == Exit.OK
        shutil.copy(trained, reference)
        done = subprocess.run(
            [*shlex.split(hook["entry"]), *used["args"]],
            cwd=tmp_path, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        assert done.returncode == code, done.stderr


def test_the_steps_of_the_action_run_and_fail_as_they_should(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    action = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
    steps = {step["name"]: step for step in action["runs"]["steps"]}
    given = {name: field.get("default", "") for name, field in action["inputs"].items()}
    given |= {"checkpoint": str(checkpoints[0]), "backends": "ort-cpu", "size": "64"}
    (tmp_path / "replk.toml").write_text("[deploy]\nmax-seconds = 3\n")
    path = installed(tmp_path / "bin")

    def run(name: str) -> tuple[int, dict[str, str], str]:
        out = tmp_path / "output"
        out.write_text("")
        said = {key: re.fullmatch(r"\$\{\{ inputs\.([\w-]+) \}\}", text) for key, text in steps[name]["env"].items()}
        environment = {key: given[found[1]] for key, found in said.items() if found}
        assert environment.keys() == steps[name]["env"].keys()
        environment |= {"PATH": path, "GITHUB_OUTPUT": str(out)}
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", steps[name]["run"]],
            cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        return done.returncode, dict(line.split("=", 1) for line in out.read_text().splitlines()), done.stderr

    code, outputs, words = run("Deploy")
    assert (code, outputs["verdict"]) == (0, "pass"), words
    assert (tmp_path / outputs["report"]).read_text().startswith("# ")
    assert suite(tmp_path / "replk-out" / "junit-deploy.xml")[1] == []

    bench = next((tmp_path / "replk-out").glob("*/results/bench.json"))
    record_ = json.loads(bench.read_text())
    for row_ in record_["rows"]:  # quiet, whatever the machine
        row_ |= {"unstable": [], "p90_ms": None, "p99_ms": None}
        row_["p50_ms"]["interval"] = [row_["p50_ms"]["value"] * end for end in (0.999, 1.001)]
    bench.write_text(json.dumps(record_))
    for row_ in record_["rows"]:
        row_["samples_ms"] = [ms / 100 for ms in row_["samples_ms"]]
        p50 = row_["p50_ms"]["value"] / 100
        row_["p50_ms"] |= {"value": p50, "interval": [p50 * 0.999, p50 * 1.001]}
    given["baseline"] = str(tmp_path / "baseline.json")
    Path(given["baseline"]).write_text(json.dumps(record_))
    code, outputs, words = run("Compare")
    assert (code, outputs["verdict"]) == (Exit.REGRESSION, "failed"), "a hundred times slower than the baseline"
    assert "::error" in words
    assert action["outputs"]["verdict"]["value"].startswith("${{ steps.compare.outputs.verdict ||")
    given["baseline"] = str(bench)
    code, outputs, words = run("Compare")
    assert (code, outputs["verdict"]) in {(0, ""), (Exit.INCONCLUSIVE, "failed")}, words

    given["checkpoint"] = str(tmp_path / "missing.pth")
    code, outputs, words = run("Deploy")
    assert (code, outputs) == (Exit.USAGE, {"verdict": "failed"}), "and no report, which would be an earlier run's"
    assert "::error" in words
    (tmp_path / "fp32").write_text("what a pattern would find")
    given["precision"] = "fp*"
    assert "--precision fp* is not known" in run("Deploy")[2]
    name = bench.parent.parent.name
    assert (tmp_path / "replk-out" / name / "report.md").is_file()
    (tmp_path / "bin" / "replk").write_text(f"#!/bin/sh\necho {name} > replk-out/latest\nexit 3\n")
    code, outputs, _ = run("Deploy")
    assert (code, outputs) == (Exit.MISMATCH, {"verdict": "failed"}), "it ended before its report"
    assert all(
        "${{" not in step.get("run", "")
        for step in (*steps.values(), *snippet("ci.md", "jobs")["jobs"]["deploy"]["steps"])
    )
    used = set(re.findall(r"inputs\.([\w-]+)", json.dumps(action["runs"])))
    assert used == action["inputs"].keys(), "each input is used"


def test_our_own_workflow_runs_the_tests_and_the_action_as_they_are() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    assert workflow.keys() >= {"jobs", True}, "`on` is true in YAML 1.1"
    (job,) = workflow["jobs"].values()
    steps = [step.get("run") or step["uses"] for step in job["steps"]]
    assert "make test" in steps
    assert "make test " in (ROOT / "README.md").read_text(encoding="utf-8")
    (given,) = (step["with"] for step in job["steps"] if step.get("uses") == "./")
    assert steps.index("make test") < steps.index("./"), "which makes the .venv that the action takes replk from"
    inputs = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))["inputs"]
    assert given.keys() <= inputs.keys()
    assert given.keys() >= {name for name, field in inputs.items() if field.get("required")}
    assert all((ROOT / given[name]).is_file() for name in ("checkpoint", "data"))
    assert set(given["precision"].split()) <= set(PRECISIONS)
    assert set(given["backends"].split()) <= set(BACKENDS)
