"""A missing package is named with its install line; a broken one keeps its own words."""

import sys
from pathlib import Path

import pytest

from replk_deploy import optional
from replk_deploy.errors import Exit, UnavailableError


@pytest.fixture
def package_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        del sys.modules[name]


def test_what_is_installed_is_given() -> None:
    assert optional.load("json.decoder", package="json", install="json") is sys.modules["json.decoder"]


@pytest.mark.parametrize("module", ["replk_no_such_runtime", "replk_no_such_runtime.inner.module"])
def test_a_missing_package_is_unavailable_and_the_remedy_can_be_pasted(module: str) -> None:
    with pytest.raises(UnavailableError) as caught:
        optional.load(module, package="the runtime", install="replk-deploy[runtime]")
    assert caught.value.problem == "the runtime is not installed"
    assert caught.value.remedy == "pip install 'replk-deploy[runtime]'"
    assert caught.value.code == Exit.UNAVAILABLE


def test_an_installed_package_without_its_own_dependency_says_which(package_folder: Path) -> None:
    (package_folder / "replk_half.py").write_text("import replk_gone_dependency\n")
    with pytest.raises(ModuleNotFoundError, match="replk_gone_dependency"):
        optional.load("replk_half", package="half", install="half")


def test_a_dependency_whose_name_begins_like_the_package_is_not_mistaken_for_it(package_folder: Path) -> None:
    (package_folder / "replk_half_there.py").write_text("import replk_half\n")
    with pytest.raises(ModuleNotFoundError, match="'replk_half'"):
        optional.load("replk_half_there", package="half", install="half")


@pytest.mark.parametrize("words", ["raise ImportError('libcudart.so.12 is missing')", "raise OSError('libnvinfer')"])
def test_a_library_that_fails_to_load_keeps_its_own_words(package_folder: Path, words: str) -> None:
    (package_folder / "replk_broken.py").write_text(words)
    with pytest.raises((ImportError, OSError), match="lib"):
        optional.load("replk_broken", package="broken", install="broken")
