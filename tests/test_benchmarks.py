import json
from pathlib import Path

from benchmarks import errors

DOCS = Path(__file__).parent.parent / "docs"


def test_the_page_of_errors_says_what_the_record_says():
    record = json.loads((DOCS / "benchmarks" / "errors.json").read_text())

    assert set(record["variants"]) == {"RepLKNet-31B", "RepLKNet-31L", "RepLKNet-XL"}
    assert (DOCS / "errors.md").read_text() == errors.page(record)


def test_every_recorded_step_is_inside_its_limit_and_none_is_blind():
    record = json.loads((DOCS / "benchmarks" / "errors.json").read_text())

    rows = [row for variant in record["variants"].values() for row in variant["rows"]]
    assert all(row["rel_l2"] <= row["limit"] and row["signal"] > 1e-2 for row in rows)


def test_the_commands_were_measured_inside_the_limits_they_promise():
    rows = json.loads((DOCS / "benchmarks" / "commands.json").read_text())["rows"]

    for command, row in rows.items():
        assert row["median_s"] <= row["limits"].get("seconds", float("inf")), command
        assert row["peak_gb"] <= row["limits"].get("peak_gb", float("inf")), command
