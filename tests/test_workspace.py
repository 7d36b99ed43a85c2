"""The run folder gives out only files that it can vouch for."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from replk_deploy import files
from replk_deploy.errors import Exit, IntegrityError, ReplkError
from replk_deploy.metadata import Verdict
from replk_deploy.workspace import Workspace

FROM = {"checkpoint.pth": "0" * 64}
OPTIONS = {"level": "full", "size": (64, 80), "proved": True}
PASS = Verdict(state="pass", content="c", reference="r", worst=0.25, why="inside")
NAME = "fused.safetensors"


def enter(run: Workspace, name: str = NAME, content: bytes = b"weights", **changes: Any) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    run.path(name).write_bytes(content)
    said = {"made_from": FROM, "by": "fuse", "options": OPTIONS, "verdict": PASS} | changes
    run.record(name, **said)


def test_what_was_entered_is_there_for_the_next_process(tmp_path: Path) -> None:
    enter(Workspace(tmp_path / "tiny"))
    again = Workspace(tmp_path / "tiny")
    assert again.take(NAME).read_bytes() == b"weights"
    entry = again.entry(NAME)
    assert (entry.sha256, entry.by, entry.made_from) == (files.sha256(again.path(NAME)), "fuse", FROM)
    assert entry.verdict == PASS
    assert again.fresh(NAME, FROM, OPTIONS)


@pytest.mark.parametrize("content", [b"weightz", b"weight", b"weights ", b""])
def test_an_altered_file_is_never_given_out(tmp_path: Path, content: bytes) -> None:
    enter(Workspace(tmp_path / "tiny"))
    (tmp_path / "tiny" / NAME).write_bytes(content)
    run = Workspace(tmp_path / "tiny")
    for ask in (lambda: run.take(NAME), lambda: run.fresh(NAME, FROM, OPTIONS)):
        with pytest.raises(IntegrityError, match="its hash differs") as caught:
            ask()
        assert caught.value.code == Exit.INTEGRITY
        assert "replk fuse" in caught.value.remedy
        assert f"rm {run.path(NAME)}" in caught.value.remedy


def test_a_missing_or_unknown_file_is_not_given_out(tmp_path: Path) -> None:
    run = Workspace(tmp_path / "tiny")
    enter(run)
    run.path("stranger.onnx").write_bytes(b"from elsewhere")
    with pytest.raises(IntegrityError, match=r"stranger\.onnx is missing"):
        run.take("stranger.onnx")
    run.path(NAME).unlink()
    with pytest.raises(IntegrityError, match="is missing"):
        run.take(NAME)
    assert not run.fresh(NAME, FROM, OPTIONS)


@pytest.mark.parametrize(
    ("made_from", "options"),
    [
        ({"checkpoint.pth": "1" * 64}, OPTIONS),
        ({"other.pth": "0" * 64}, OPTIONS),
        ({**FROM, "second": "0"}, OPTIONS),
        ({}, OPTIONS),
        (FROM, {**OPTIONS, "level": "merge"}),
        (FROM, {**OPTIONS, "size": (80, 64)}),
        (FROM, {**OPTIONS, "proved": False}),
        (FROM, {**OPTIONS, "new option": 1}),
        (FROM, {}),
    ],
)
def test_other_sources_or_options_are_not_fresh(tmp_path: Path, made_from: dict, options: dict) -> None:
    run = Workspace(tmp_path / "tiny")
    enter(run)
    assert run.fresh(NAME, FROM, OPTIONS)
    assert not run.fresh(NAME, made_from, options)


def test_a_crash_between_file_and_manifest_leaves_a_file_that_nothing_vouches_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(Workspace(tmp_path / "tiny"))

    def crash(*_args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(files, "write_text", crash)
        with pytest.raises(KeyboardInterrupt):
            enter(Workspace(tmp_path / "tiny"), content=b"new weights")
        with pytest.raises(KeyboardInterrupt):
            enter(Workspace(tmp_path / "tiny"), name="model.fp32.onnx")
    after = Workspace(tmp_path / "tiny")
    assert after.entry("model.fp32.onnx") is None
    with pytest.raises(IntegrityError):
        after.take("model.fp32.onnx")
    with pytest.raises(IntegrityError, match="its hash differs"):
        after.take(NAME)


def test_a_rename_that_fails_leaves_the_old_manifest_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(Workspace(tmp_path / "tiny"))
    before = (tmp_path / "tiny" / "manifest.json").read_bytes()

    def crash(_part: Path, _path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(files, "commit", crash)
        with pytest.raises(KeyboardInterrupt):
            enter(Workspace(tmp_path / "tiny"), name="model.fp32.onnx")
    assert (tmp_path / "tiny" / "manifest.json").read_bytes() == before
    assert not list(tmp_path.rglob("*.part"))


DAMAGES = {
    "empty": lambda _text: "",
    "cut short": lambda text: text[: len(text) // 2],
    "not JSON": lambda _text: "replk",
    "another record": lambda text: text.replace("replk.manifest", "replk.bench"),
    "a newer format": lambda text: text.replace("manifest/1", "manifest/2"),
    "no artefacts": lambda text: text.replace('"artefacts"', '"things"'),
    "a list of artefacts": lambda text: json.dumps(json.loads(text) | {"artefacts": []}),
    "an entry without hash": lambda text: text.replace('"sha256"', '"md5"'),
    "an entry without verdict": lambda text: text.replace('"verdict"', '"opinion"'),
    "a verdict of other fields": lambda text: text.replace('"reference"', '"against"'),
    "an entry that is text": lambda text: json.dumps(json.loads(text) | {"artefacts": {NAME: "there"}}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_manifest_is_refused_before_anything_is_taken(tmp_path: Path, damage: str) -> None:
    enter(Workspace(tmp_path / "tiny"))
    path = tmp_path / "tiny" / "manifest.json"
    path.write_text(DAMAGES[damage](path.read_text()))
    with pytest.raises(IntegrityError) as caught:
        Workspace(tmp_path / "tiny")
    assert caught.value.code == Exit.INTEGRITY
    assert caught.value.remedy


def test_the_latest_run_is_the_one_that_was_named_last(tmp_path: Path) -> None:
    one, two = Workspace(tmp_path / "one"), Workspace(tmp_path / "two")
    enter(one)
    enter(two)
    two.make_latest()
    assert Workspace.latest(tmp_path).name == "two"
    one.make_latest()
    assert Workspace.latest(tmp_path).name == "one"


@pytest.mark.parametrize("pointer", [None, "", "\n", "gone\n"])
def test_without_a_run_the_remedy_is_to_begin_one(tmp_path: Path, pointer: str | None) -> None:
    if pointer is not None:
        (tmp_path / "latest").write_text(pointer)
    with pytest.raises(ReplkError, match="there is no run in") as caught:
        Workspace.latest(tmp_path)
    assert (caught.value.code, caught.value.remedy) == (Exit.USAGE, "begin with: replk fuse CHECKPOINT")


def test_a_folder_without_a_manifest_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ReplkError, match="is not a run folder"):
        Workspace.open(tmp_path)
    enter(Workspace(tmp_path))
    assert Workspace.open(tmp_path).entry(NAME)


def test_artefacts_come_newest_first_even_after_one_is_made_again(tmp_path: Path) -> None:
    run = Workspace(tmp_path / "tiny")
    for name in ("model.fp32.onnx", "model.fp16.onnx", NAME):
        enter(run, name=name)
    assert run.artefacts(".onnx") == ("model.fp16.onnx", "model.fp32.onnx")
    enter(run, name="model.fp32.onnx", content=b"again")
    assert run.artefacts(".onnx") == ("model.fp32.onnx", "model.fp16.onnx")
    assert Workspace(tmp_path / "tiny").artefacts(".onnx") == ("model.fp32.onnx", "model.fp16.onnx")
    assert run.artefacts(".safetensors") == (NAME,)


def test_two_writers_lose_nothing(tmp_path: Path) -> None:
    """Each writer opens the run before the other has written, again and again."""
    Workspace(tmp_path / "tiny").save()

    def write(who: str) -> None:
        for count in range(20):
            enter(Workspace(tmp_path / "tiny"), f"{who}{count}.onnx")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, "abcd"))
    assert len(Workspace(tmp_path / "tiny").artefacts(".onnx")) == 80
