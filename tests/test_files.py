"""A file is whole or absent; what was there before stays until then."""

import errno
import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replk_deploy import files
from replk_deploy.errors import ReplkError


def left_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if p.is_file())


@settings(deadline=None, max_examples=20, derandomize=True)
@given(content=st.binary(max_size=300))
def test_the_hash_is_that_of_the_content(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("hash") / "file"
    path.write_bytes(content)
    assert files.sha256(path) == hashlib.sha256(content).hexdigest()


def test_a_long_file_is_hashed_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "long"
    path.write_bytes(b"a" * (3 * 2**20) + b"b")
    before = files.sha256(path)
    path.write_bytes(b"a" * (3 * 2**20) + b"c")
    assert files.sha256(path) != before


def test_nobody_sees_the_name_before_the_commit(tmp_path: Path) -> None:
    final = tmp_path / "new" / "deep" / "model.onnx"
    with files.staged(final) as part:
        part.write_text("half")
        assert not final.exists()
        assert part.parent == final.parent  # a rename across file systems is no rename
        part.write_text("whole")
        files.commit(part, final)
    assert final.read_text() == "whole"
    assert left_in(tmp_path) == ["model.onnx"]


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt, SystemExit, MemoryError])
def test_whatever_stops_the_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path, stop) -> None:
    final = tmp_path / "model.onnx"
    final.write_text("old")

    def interrupted() -> None:
        with files.staged(final) as part:
            part.write_text("half of the new")
            raise stop

    with pytest.raises(stop):
        interrupted()
    assert final.read_text() == "old"
    assert left_in(tmp_path) == ["model.onnx"]


def test_a_block_that_ends_without_a_commit_writes_nothing(tmp_path: Path) -> None:
    with files.staged(tmp_path / "model.onnx") as part:
        part.write_text("never asked for")
    assert left_in(tmp_path) == []


def test_two_names_in_one_folder_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    with files.staged(tmp_path / "a") as one, files.staged(tmp_path / "b") as two:
        assert one != two
        one.write_text("a")
        two.write_text("b")
        files.commit(two, tmp_path / "b")
        files.commit(one, tmp_path / "a")
    assert [(tmp_path / n).read_text() for n in "ab"] == ["a", "b"]


def test_a_folder_that_is_a_file_is_refused_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(ReplkError, match=r"taken cannot be written") as caught, files.staged(tmp_path / "taken" / "x"):
        raise AssertionError("the block must not run")
    assert "name another place" in caught.value.remedy
    assert left_in(tmp_path) == ["taken"]


def test_a_folder_without_the_right_to_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(**_kwargs: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(files, "TemporaryFile", forbidden)  # chmod does not stop root
    with pytest.raises(ReplkError, match=f"{tmp_path} cannot be written: Permission denied") as caught:
        files.writable(tmp_path)
    assert "-o" not in caught.value.remedy, "not every command has it"
    with pytest.raises(ReplkError, match="Permission denied"), files.staged(tmp_path / "x"):
        raise AssertionError("the block must not run")


@pytest.mark.parametrize("error", [FileNotFoundError, PermissionError])
def test_another_file_that_cannot_be_used_is_the_one_that_is_named(tmp_path: Path, error: type[OSError]) -> None:
    source = str(tmp_path / "source.onnx")
    with pytest.raises(ReplkError, match=f"^{source}: why ") as caught, files.staged(tmp_path / "x"):
        raise error(1, "why", source)
    assert "cannot be written" not in caught.value.problem
    for place in (tmp_path / ".x.part", None):
        with pytest.raises(ReplkError, match="x cannot be written: full "), files.staged(tmp_path / "x") as part:
            raise OSError(errno.ENOSPC, "full", place and str(part))
    assert left_in(tmp_path) == []


def test_a_name_taken_by_a_folder_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").mkdir()
    with pytest.raises(ReplkError, match=r"model\.onnx cannot be written"):
        files.write_text(tmp_path / "model.onnx", "text")
    assert left_in(tmp_path) == []


def test_a_disk_that_fails_at_the_last_moment_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "manifest.json"
    files.write_text(path, "old")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ReplkError, match="No space left"):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    assert left_in(tmp_path) == ["manifest.json"]


def test_a_name_that_no_file_can_take_is_refused_and_asking_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old").write_text("old")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    for name in ("old", "new", "missing/deep/new"):
        files.demand(Path(name))
        files.demand(tmp_path / name)
    for name, why in (("folder", "is a folder"), ("pipe", "is no plain file"), ("old/x/y", "Not a directory")):
        with pytest.raises(ReplkError, match=f"{name} .*{why}"):
            files.demand(Path(name))

    def forbidden(**_kwargs: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(files, "TemporaryFile", forbidden)  # chmod does not stop root
    with pytest.raises(ReplkError, match="new cannot be written: Permission denied"):
        files.demand(Path("missing/new"))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("text", ["", "γ ÷ √(σ² + ε)\n", "a\nb\n"])
def test_text_comes_back_as_it_went(tmp_path: Path, text: str) -> None:
    files.write_text(tmp_path / "deep" / "text", text)
    assert (tmp_path / "deep" / "text").read_bytes() == text.encode()
