"""The demonstration works from what a wheel holds, and a wheel holds what it should."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from replk_deploy import __version__, pipeline

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "replk_deploy"


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Build the sdist from nothing but what it needs, and the wheel from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"
    shutil.copytree(PACKAGE, source / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "THIRD_PARTY_NOTICES.md"):
        shutil.copy(ROOT / name, source)
    line = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def replk(wheel: Path, folder: Path, *line: str) -> "subprocess.CompletedProcess[str]":
    """Run the program of a wheel, unpacked as pip unpacks it, from a folder in which there is no checkout."""
    home = folder / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", home, wheel]
    subprocess.run(pip, check=True, timeout=300, capture_output=True)
    return subprocess.run(
        [sys.executable, home / "bin" / "replk", *line],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(home)},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )


def test_wheel_and_sdist_hold_the_whole_package(distributions: tuple[Path, Path]) -> None:
    sdist, wheel = distributions
    wanted = {
        path.relative_to(ROOT).as_posix(): path.stat().st_size
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    for needed in ("py.typed", "samples/digits.pth", "samples/digits-test.npz", "kernels/src/direct.cu"):
        assert f"replk_deploy/{needed}" in wanted
    with zipfile.ZipFile(wheel) as packed:
        held = {item.filename: item.file_size for item in packed.infolist()}
        (metadata,) = [name for name in held if name.endswith(".dist-info/METADATA")]
        assert f"\nVersion: {__version__}\n" in packed.read(metadata).decode()
    assert {name: size for name, size in held.items() if ".dist-info/" not in name} == wanted
    assert {name.rpartition("/")[2] for name in held if "/licenses/" in name} == {"LICENSE", "THIRD_PARTY_NOTICES.md"}
    with tarfile.open(sdist) as packed:
        files = {item.name.partition("/")[2]: item.size for item in packed if item.isfile()}
    assert wanted.items() <= files.items()
    assert {"LICENSE", "THIRD_PARTY_NOTICES.md"} <= set(files)


def test_the_program_of_a_wheel_starts_and_finds_its_samples(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    done = replk(distributions[1], tmp_path, "demo", "--help")
    assert done.returncode == 0, done.stderr
    assert "--max-seconds" in done.stdout
    code = (
        "from replk_deploy.pipeline.demonstrating import SAMPLES as S; print(S, *sorted(p.name for p in S.iterdir()))"
    )
    said = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.split() == [
        str(tmp_path / "installed" / "replk_deploy" / "samples"),
        "digits-test.npz",
        "digits.pth",
    ]


def test_it_takes_the_samples_in_both_precisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}
    monkeypatch.setattr(
        "replk_deploy.pipeline.demonstrating.deploy", lambda path, **choices: asked.update(choices, path=path)
    )
    pipeline.demo(max_seconds=1.0, root=tmp_path)
    assert asked["path"].is_file()
    assert asked["data"].is_file()
    assert (asked["precisions"], asked["max_seconds"], asked["root"]) == (("fp32", "fp16"), 1.0, tmp_path)


@pytest.mark.slow
def test_the_demonstration_of_a_wheel_passes(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    done = replk(distributions[1], tmp_path, "demo", "--max-seconds", "1", "--json", "demo.json")
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))
    assert said["state"] == "pass"
    assert [step["correct"] for step in said["accuracy"]] == [356] * 4
