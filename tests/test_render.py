"""Words for a tired reader: nothing is lost at any width, and markup in a file's name is only text."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar, get_args

import pytest
from rich.console import Console

from replk_deploy import render
from replk_deploy.errors import CheckpointError, ReplkError
from replk_deploy.metadata import State

NASTY = "[red]ckpt[/red] [/] \\[x] 50% | :x: σ.pth"


@dataclass(frozen=True)
class Result:
    KIND: ClassVar[str] = "thing"
    FORMAT: ClassVar[int] = 1

    label: str


@pytest.fixture(params=[20, 60, 200])
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    for console in (render.out, render.err):
        monkeypatch.setattr(console, "_width", request.param)
    return request.param


def last(text: str) -> str:
    return text.rstrip("\n").rpartition("\n")[2]


def test_every_state_has_a_word_of_its_own_and_a_colour() -> None:
    assert set(get_args(State)) <= render.WORDS.keys()
    assert render.COLOURS.keys() == render.WORDS.keys()
    assert len(set(render.WORDS.values())) == len(render.WORDS)
    assert (render.WORDS["pass"], render.WORDS["rejected"]) == ("PASS", "FAIL")
    assert not [w for s, w in render.WORDS.items() if s not in {"pass", "provisional"} and "PASS" in w]


@pytest.mark.parametrize("state", sorted(render.WORDS))
def test_the_last_line_is_the_verdict_in_one_piece(state: str, width: int, capsys) -> None:
    del width
    text = f"fuse {NASTY} · " + "long/" * 40 + "fused.safetensors"
    render.show(Result("x"), lambda: render.note("before"), text, state, as_json=None)
    said = capsys.readouterr()
    assert last(said.out) == f"{render.WORDS[state]} {text}"
    assert "\x1b" not in said.out
    assert said.err == "before\n"


@pytest.mark.parametrize("state", ["pass", "rejected"])
def test_json_on_stdout_is_alone_and_whole(state: str, width: int, capsys) -> None:
    del width

    def never() -> None:
        raise AssertionError("words belong to nobody here")

    render.show(Result(NASTY), never, "fuse x", state, as_json=Path("-"))
    said = capsys.readouterr()
    assert json.loads(said.out) == {"schema": "replk.thing/1", "label": NASTY}
    assert said.err == f"{render.WORDS[state]} fuse x\n"


def test_json_in_a_file_leaves_the_words_where_they_were(tmp_path: Path, capsys) -> None:
    render.show(Result(NASTY), lambda: render.out.print("words"), "fuse x", "pass", as_json=tmp_path / "new" / "r.json")
    assert json.loads((tmp_path / "new" / "r.json").read_text()) == {"schema": "replk.thing/1", "label": NASTY}
    assert capsys.readouterr().out == "words\nPASS fuse x\n"


def test_a_json_file_that_cannot_be_written_is_no_success(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ReplkError):
        render.show(Result("x"), lambda: None, "fuse x", "pass", as_json=tmp_path / "file" / "r.json")
    assert "PASS" not in capsys.readouterr().out


def test_a_refusal_can_be_copied_in_one_piece(width: int, capsys) -> None:
    del width
    remedy = "pip install 'replk-deploy[cpu]' " + "and-a-long-word-" * 20
    render.error(CheckpointError(f"{NASTY} is empty", remedy))
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == f"error {NASTY} is empty\nfix   {remedy}\n"


@pytest.mark.parametrize(("whole", "lines"), [(False, 2), (True, 1)])
def test_a_note_is_broken_for_a_reader_and_an_annotation_is_not(whole: bool, lines: int, monkeypatch, capsys) -> None:  # noqa: FBT001
    monkeypatch.setattr(render, "err", render.console({"COLUMNS": "60", "TERM": "xterm"}, stderr=True, terminal=True))
    render.note("::error title=fuse::" + "a word " * 10, whole=whole)
    assert len(capsys.readouterr().err.splitlines()) == lines


def test_elsewhere_than_on_a_terminal_each_step_is_one_line(capsys) -> None:
    with render.bars() as progress:
        for done in range(50):
            progress("prove [fusion]", done, 50)
        progress("export", 0, None)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "· prove [fusion]\n· export\n"


def test_on_a_terminal_bars_come_and_go(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(render, "err", Console(stderr=True, force_terminal=True, width=80, _environ={}))
    with render.bars() as progress:
        for step, total in (("fuse", 3), ("warm [up]", None), ("fuse", 3)):
            for done in range(4):
                progress(step, done, total)
    said = capsys.readouterr()
    assert said.out == ""
    assert "fuse" in said.err


def test_a_bar_is_cleared_when_its_step_fails(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(render, "err", Console(stderr=True, force_terminal=True, width=80, _environ={}))

    def fail() -> None:
        with render.bars() as progress:
            progress("fuse", 1, 3)
            raise ReplkError("no", "yes")

    with pytest.raises(ReplkError):
        fail()
    assert capsys.readouterr().err.endswith(("\x1b[?25h", "\x1b[2K", "\r\x1b[1A\x1b[2K"))


def quantile(value: float, low: float | None = None, high: float | None = None) -> SimpleNamespace:
    return SimpleNamespace(value=value, interval=None if low is None else (low, high))


@pytest.mark.parametrize(("columns", "cache"), [(60, "hot"), (80, "hot"), (80, "cold")])
def test_the_latency_table_keeps_every_number(monkeypatch, capsys, columns: int, cache: str) -> None:
    monkeypatch.setattr(render.out, "_width", columns)
    row = {
        "model": "",
        "batch": 1,
        "p90_ms": quantile(13.5, 13.0, 14.0),
        "p99_ms": None,
        "gpu_p50_ms": None,
        "throughput": None,
        "ratio": None,
        "notes": (),
        "unstable": (),
        "contract": SimpleNamespace(precision="fp32", l2=cache),
        "facts": {},
    }
    first = SimpleNamespace(
        **row | {"name": "torch-compile b1", "backend": "torch-compile", "p50_ms": quantile(12.34, 12.0, 12.5)}
    )
    ratio = SimpleNamespace(median=quantile(0.51, 0.5, 0.52))
    second = SimpleNamespace(
        **row | {"name": "ort-cpu b1", "backend": "ort-cpu", "p50_ms": quantile(6.28), "ratio": ratio}
    )
    second.unstable = ("time ran out after 2 rounds [x]",)
    bench = SimpleNamespace(
        rows=(first, second), baseline="torch-compile", baseline_model=None, failures={"ort-cpu b8": "gone [y]"}
    )
    found = SimpleNamespace(bench=bench, agreements={}, artefacts={})
    render.latency(found)
    text = capsys.readouterr().out
    for part in ("12.34", "12.00-12.50", "13.50", "n/a", "baseline", "6.28", "0.51", "0.5-0.52"):
        assert part in text, part
    assert "torch-compile" in text or columns == 60
    assert "note ort-cpu b1: time ran out after 2 rounds [x]" in text
    assert "left ort-cpu b8: gone [y]" in text
    assert ("latency, cold L2" in text) == ("L2 cache emptied" in text) == (cache == "cold")
    assert "…" not in text


def test_a_proof_says_its_worst_limit_and_why_it_failed(width: int, capsys) -> None:
    judged = SimpleNamespace(
        name="poisoned, algebra", rel_l2=3.2e-2, worst=123.4, state="rejected", ties=1, flips=2, against="float64"
    )
    judged.bound = SimpleNamespace(rel_l2={"stage0": 1e-12, "stage1": 2e-12})
    why = "poisoned: logits is off; first wrong block: stages.0.blocks.0, alone 3.2e-02 off " + "x" * 100
    found = SimpleNamespace(
        agreements=(judged,), modules={"a": 1e-16, "b": 4e-2}, doubt="", state="rejected", sentence=why
    )
    render.proof(found)
    text = capsys.readouterr().out
    assert f"why  {why}\n" in text
    if width >= 60:
        for part in ("poisoned,", "algebra", "3.2e-02", "2.0e-12", "123.40", "rejected"):
            assert part in text, part
        assert re.search(r"2 re-parameterised blocks alone: worst 4\.0e-02", text)
        assert "top-1: 2 flipped, 1 between" in text


def test_a_table_whose_numbers_are_wider_than_the_window_is_folded_and_never_cut(monkeypatch, capsys) -> None:
    forms = [f"form{n}-of-a-long-name" for n in range(6)]
    costs = [SimpleNamespace(form=f, taps=(31, 31), channels=64, map=(56, 56), batch=8, ms=1.25) for f in forms]
    said = {}
    for columns in (60, 1000):
        monkeypatch.setattr(render.out, "_width", columns)
        render.calibration(SimpleNamespace(costs=costs))
        said[columns] = capsys.readouterr().out
    assert max(map(len, said[60].splitlines())) <= 60
    assert sorted(re.findall(r"\w", said[60])) == sorted(re.findall(r"\w", said[1000]))


@pytest.mark.parametrize("columns", [40, 60, 200])
def test_facts_too_long_for_the_line_are_folded_and_never_cut(monkeypatch, capsys, columns: int) -> None:
    monkeypatch.setattr(render.out, "_width", columns)
    digest = "0123456789abcdef" * 4
    render.pairs({"sha256": digest, "[odd]": NASTY})
    text = capsys.readouterr().out
    assert digest in re.sub(r"\s", "", text)
    assert "[odd]" in text
    assert "…" not in text


def test_the_chain_of_a_failed_run_is_shown_though_its_errors_are_no_numbers(width: int, capsys) -> None:
    """Records hold NaN and infinity as text, and a failure must be told like anything else."""
    judged = {"name": "checkpoint", "rel_l2": "nan", "worst": "inf", "state": "rejected"}
    proof = {"agreements": [judged | {"bound": {"rel_l2": {"logits": 1e-6}}}]}
    step = {"file": "r/rejected/fused.safetensors", "verdict": {"state": "rejected", "worst": None}, "proof": proof}
    render.chain(SimpleNamespace(fuse=step, exports=[step | {"proof": None}]))
    text = capsys.readouterr().out
    if width >= 60:
        assert re.search(r"checkpoint +│ nan +│ 1\.0e-06 │ inf", text)
        assert text.count("rejected") == 3
