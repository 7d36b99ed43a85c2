"""Results become JSON that any reader takes, and come back only as what they are."""

import dataclasses
import json
import math
from dataclasses import dataclass
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replk_deploy import records
from replk_deploy.errors import Exit, IntegrityError, ReplkError
from replk_deploy.metadata import Verdict
from replk_deploy.records import live
from replk_deploy.workspace import Entry, Manifest


class Colour(Enum):
    RED = "red"


@dataclass(frozen=True, kw_only=True)
class Inner:
    KIND: ClassVar[str] = "inner"
    FORMAT: ClassVar[int] = 2

    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    KIND: ClassVar[str] = "outer"
    FORMAT: ClassVar[int] = 1
    DERIVED: ClassVar[tuple[str, ...]] = ("double",)

    model: object = live()
    place: Path
    inner: Inner
    colour: Colour
    code: IntEnum
    numbers: tuple[float, ...]
    table: dict[Any, Any]

    @property
    def double(self) -> float:
        return 2 * self.inner.value


def test_a_result_is_written_with_what_follows_from_it_and_without_what_is_alive() -> None:
    result = Outer(
        model=object(),
        place=Path("a") / "b.onnx",
        inner=Inner(value=1.5),
        colour=Colour.RED,
        code=Exit.MISMATCH,
        numbers=(1.0, math.nan, math.inf, -math.inf),
        table={3: frozenset({True}), "x": None},
    )
    assert json.loads(records.to_json(result)) == {
        "schema": "replk.outer/1",
        "place": "a/b.onnx",
        "inner": {"schema": "replk.inner/2", "value": 1.5},
        "colour": "red",
        "code": 3,
        "numbers": [1.0, "nan", "inf", "-inf"],
        "table": {"3": [True], "x": None},
        "double": 3.0,
    }


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def same(written: Any, value: Any) -> bool:
    """Whether JSON's reading is the value again; a number that JSON does not have is read from its text."""
    if isinstance(value, float) and not math.isfinite(value):
        return written == str(value)
    if isinstance(value, dict):
        return written.keys() == value.keys() and all(same(written[k], v) for k, v in value.items())
    if isinstance(value, list):
        return len(written) == len(value) and all(map(same, written, value))
    return type(written) is type(value) and written == value


@settings(deadline=None, max_examples=80, derandomize=True)
@given(value=values)
def test_every_plain_value_comes_back_from_strict_json(value: Any) -> None:
    text = records.to_json({"it": value})
    assert text.endswith("}\n")

    def strict(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    assert same(json.loads(text, parse_constant=strict)["it"], value)


def test_a_class_is_not_taken_for_its_instance() -> None:
    assert records.plain(Inner) is Inner


def manifest() -> Manifest:
    verdict = Verdict(state="pass", content="c", reference="r", worst=0.3, why="fine")
    entry = Entry(sha256="s", made_from={"a": "b"}, by="fuse", options={"size": [64, 64]}, verdict=verdict)
    return Manifest(run="tiny", artefacts={"fused.safetensors": entry})


def test_a_record_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(records.to_json(manifest()))
    found = records.read(path, "manifest", 1)
    assert found == {"schema": "replk.manifest/1", **dataclasses.asdict(manifest())}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_a_record_cut_short_anywhere_is_refused(tmp_path: Path, share: float) -> None:
    text = records.to_json(manifest())
    path = tmp_path / "manifest.json"
    path.write_text(text[: int(len(text) * share)])
    with pytest.raises(IntegrityError, match="is not a record of replk"):
        records.read(path, "manifest", 1)


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"null",
        b"3",
        b'"replk.manifest/1"',
        b"{}",
        b'{"schema": null}',
        b'{"schema": "replk.manifest"}',
        b'{"schema": "replk.manifest/"}',
        b'{"schema": "replk.manifest/new"}',
        b"\xff\xfe\x00",
        b"PK\x03\x04",
        b"[" * 200_000,
    ],
)
def test_something_else_is_refused_as_no_record(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match="is not a record of replk"):
        records.read(path, "manifest", 1)


def test_a_folder_and_a_missing_file_are_no_records(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="is not a record of replk"):
        records.read(tmp_path, "manifest", 1)
    with pytest.raises(ReplkError, match=r"missing\.json does not exist") as caught:
        records.read(tmp_path / "missing.json", "manifest", 1)
    assert caught.value.code == Exit.USAGE


def test_another_kind_and_a_newer_format_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text('{"schema": "replk.bench/1"}')
    with pytest.raises(IntegrityError, match=r"holds replk\.bench, not replk\.manifest"):
        records.read(path, "manifest", 1)
    path.write_text('{"schema": "replk.manifest/3"}')
    with pytest.raises(IntegrityError, match="has format 3; this version reads up to 2") as caught:
        records.read(path, "manifest", 2)
    assert caught.value.remedy == "pip install --upgrade replk-deploy"
    assert records.read(path, "manifest", 3) == {"schema": "replk.manifest/3"}
