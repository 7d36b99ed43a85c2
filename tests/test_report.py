"""The report is a function of the record alone, and its tables hold whatever the files are called."""

import copy
import re
from typing import Any

import pytest

from replk_deploy import report


def agreement(name: str, state: str = "pass", worst: float = 0.25) -> dict[str, Any]:
    return {
        "name": name,
        "rel_l2": 3.3e-7,
        "worst": worst,
        "state": state,
        "bound": {"rel_l2": {"logits": 1e-6, "other": 2e-6}},
    }


def step(file: str, *rows: dict[str, Any], state: str = "pass", worst: float | None = 0.25) -> dict[str, Any]:
    verdict = {"state": state, "worst": worst, "content": "ab" * 32, "why": "x"}
    return {"file": file, "verdict": verdict, "proof": {"agreements": list(rows)} if rows else None}


def layer(name: str, kernel: int) -> dict[str, Any]:
    return {"name": name, "channels": 8, "kernel": kernel, "map": [16, 12], "macs": 2_000_000, "inside_macs": 500_000}


def quantile(value: float) -> dict[str, Any]:
    return {"value": value, "interval": [value - 0.5, value + 0.5]}


def bench_row(backend: str, ratio: float | None) -> dict[str, Any]:
    return {
        "backend": backend,
        "batch": 4,
        "contract": {"precision": "fp32"},
        "p50_ms": quantile(12.5),
        "p90_ms": quantile(14.0),
        "p99_ms": None,
        "missing": {"p99_ms": "n/a (n=60, needs 500)"},
        "ratio": None if ratio is None else {"median": quantile(ratio)},
        "n": 60,
        "unstable": ["time ran out"] if ratio else [],
    }


@pytest.fixture
def run() -> dict[str, Any]:
    return {
        "state": "provisional",
        "inspection": {
            "checkpoint": {
                "label": "RepLKNet-test",
                "file": "best.pth",
                "form": "training",
                "wrapper": "model",
                "warnings": ["it also holds averaged weights"],
                "sha256": "cd" * 32,
            },
            "size": [64, 48],
            "classes": 10,
            "outputs": ["logits"],
            "parameters": 1_234_567,
            "fused_macs": 2_345_000_000,
            "large": [layer("a", 31), layer("b", 31), layer("c", 13)],
        },
        "fuse": step("replk-out/x/fused.safetensors", agreement("poisoned, algebra"), agreement("checkpoint")),
        "exports": [
            step("replk-out/x/model.fp32.onnx", agreement("checkpoint", worst=0.31), worst=0.31),
            step("replk-out/x/model.bf16.onnx", state="provisional", worst=None),
        ],
        "accuracy": [{"step": "trained", "top1": 0.925, "correct": 37, "images": 40, "same_as_first": 40}],
        "problem": "",
        "bench": {
            "bench": {
                "baseline": "torch",
                "rows": [bench_row("torch", None), bench_row("ort-cpu", 0.75)],
                "environment": {"cpu": "a processor", "torch": "2.13", "python": "3.11"},
            },
            "skipped": {"openvino": "openvino is not installed"},
        },
    }


def tables(text: str) -> list[list[list[str]]]:
    """Read Markdown tables as GitHub does: an escaped bar is a character."""
    found: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            found[-1].append([c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif found[-1]:
            found.append([])
    return [t for t in found if t]


def test_every_fact_has_its_place(run: dict[str, Any]) -> None:
    text = report.markdown(run)
    assert text.startswith("# RepLKNet-test: provisional\n")
    assert text.endswith("|\n")
    proof, accuracy, latency, large, files = tables(text)
    assert ["fused.safetensors", "poisoned, algebra", "3.3e-07", "2.0e-06", "0.25", "pass"] in proof
    assert ["model.fp32.onnx", "**verdict**", "", "", "0.31", "**pass**"] in proof
    assert ["model.bf16.onnx", "**verdict**", "", "", "", "**provisional**"] in proof
    assert accuracy[2:] == [["trained", "92.50%", "37 of 40", "40 of 40"]]
    assert latency[2][:4] == ["torch", "4", "fp32", "12.500 [12.000, 13.000]"]
    assert [row[6] for row in latency[2:]] == ["baseline", "0.75 [0.25, 1.25]"]
    assert [row[5] for row in latency[2:]] == ["n/a (n=60, needs 500)"] * 2
    assert large[2:] == [
        ["2", "31x31", "8", "16x12", "2.0", "25.0%"],
        ["1", "13x13", "8", "16x12", "2.0", "25.0%"],
    ]
    assert files[2:] == [
        ["best.pth", "checkpoint", f"`{'cd' * 32}`"],
        ["fused.safetensors", "pass", f"`{'ab' * 32}`"],
        ["model.fp32.onnx", "pass", f"`{'ab' * 32}`"],
        ["model.bf16.onnx", "provisional", f"`{'ab' * 32}`"],
    ]
    for part in (
        "1.23 M parameters, 2.345 GMAC fused at 64x48",
        "> it also holds averaged weights",
        "> ort-cpu, batch 4: time ran out",
        "> openvino skipped: openvino is not installed",
        "cpu a processor, torch 2.13, python 3.11.",
    ):
        assert part in text


def test_the_same_record_gives_the_same_text_and_stays_as_it_was(run: dict[str, Any]) -> None:
    before = copy.deepcopy(run)
    assert report.markdown(run) == report.markdown(run)
    assert run == before


def test_what_was_not_done_is_not_there(run: dict[str, Any]) -> None:
    text = report.markdown(run | {"accuracy": [], "bench": None, "exports": []})
    assert "## Accuracy" not in text
    assert "## Latency" not in text
    assert "onnx" not in text
    assert "## Proof" in text


def test_a_rejected_run_says_so_first(run: dict[str, Any]) -> None:
    bad = step("r/rejected/fused.safetensors", agreement("checkpoint", "rejected", 9e9), state="rejected", worst=9e9)
    text = report.markdown(run | {"state": "rejected", "fuse": bad, "exports": [], "accuracy": [], "bench": None})
    assert text.splitlines()[0] == "# RepLKNet-test: rejected"
    assert ["fused.safetensors", "**verdict**", "", "", "9000000000.00", "**rejected**"] in tables(text)[0]


def test_a_backbone_has_feature_maps_for_classes(run: dict[str, Any]) -> None:
    run["inspection"] |= {"classes": None, "outputs": ["stage0", "stage3"]}
    assert "backbone (stage0, stage3)" in report.markdown(run)


@pytest.mark.parametrize("name", ["a|b.pth", "a||.pth", "|"])
def test_a_bar_in_a_name_breaks_no_table(run: dict[str, Any], name: str) -> None:
    run["inspection"]["checkpoint"]["file"] = name
    run["fuse"]["proof"]["agreements"][0]["name"] = name
    for table in tables(report.markdown(run)):
        assert {len(row) for row in table} == {len(table[0])}


def test_values_that_json_does_not_have_are_texts_and_shown(run: dict[str, Any]) -> None:
    """An error of NaN or infinity is stored as text: a report of a failure must not fail itself."""
    run["fuse"] = step("x/fused.safetensors", agreement("checkpoint", "rejected"), state="rejected", worst=None)
    run["fuse"]["proof"]["agreements"][0] |= {"rel_l2": "nan", "worst": "inf"}
    assert ["fused.safetensors", "checkpoint", "nan", "2.0e-06", "inf", "rejected"] in tables(report.markdown(run))[0]
