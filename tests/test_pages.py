"""What README, tutorial and how-to tell a reader to type works in the order in which it stands there."""

import re
import shlex
import warnings
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from replk_deploy.cli import app
from replk_deploy.models.replknet import RepLKGeometry
from tests import networks, test_checkpoint

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(sh|python)([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
EXCEPTIONS = {"README.md": 3, "docs/tutorial.md": 0, "docs/howto.md": 3}
TINY = RepLKGeometry(
    channels=(4, 6), depths=(1, 1), kernels=(13, 7), small=3, dw_channels=(4, 6), ffn_channels=(8, 12), classes=10
)


def blocks(page: str) -> list[tuple[str, str, str]]:
    return FENCE.findall((ROOT / page).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write what the pages begin with: a training checkpoint with averaged weights, and a segmenter."""
    folder = tmp_path_factory.mktemp("files")
    raw, averaged = (networks.trained(TINY, seed=seed, size=32) for seed in (0, 1))
    said = {"epoch": 299, "args": networks.training_args(input_size=32)}
    torch.save({"model": raw.state_dict(), "model_ema": averaged.state_dict(), **said}, folder / "ckpt.pth")
    segmenter = test_checkpoint.mm(networks.trained(networks.BACKBONE, size=64), heads=True)
    torch.save({"meta": {}, "state_dict": segmenter}, folder / "upernet.pth")
    return folder


@pytest.mark.usefixtures("short_timing")
@pytest.mark.parametrize("page", EXCEPTIONS)
def test_a_page_works_as_it_stands(page: str, files: Path, in_empty_folder: Path) -> None:
    for file in files.iterdir():
        (in_empty_folder / file.name).write_bytes(file.read_bytes())
    names: dict[str, object] = {}
    ran = 0
    for language, info, body in blocks(page):
        if "no-run" in info:
            continue
        if language == "python":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of libraries that a page calls
                exec(compile(body, page, "exec"), names)  # noqa: S102
        for line in body.splitlines() if language == "sh" else ():
            command, _, comment = line.partition("#")
            program, *words = shlex.split(command)
            assert program == "replk", f"{page}: only replk is run; mark the block: {line}"
            allowed = {int(n) for n in re.findall(r"\d+", comment)} if comment.startswith(" exit ") else {0}
            done = CliRunner().invoke(app, words, prog_name="replk", catch_exceptions=False)
            assert done.exit_code in allowed, f"{line}\n{done.output}"
        ran += 1
    assert ran


@pytest.mark.parametrize("page", EXCEPTIONS)
def test_what_is_not_run_is_marked_with_a_reason_and_counted(page: str) -> None:
    marked = [info for _, info, _ in blocks(page) if "no-run" in info]
    assert len(marked) == EXCEPTIONS[page]
    assert all(len(info.partition("no-run")[2].split()) > 1 for info in marked)
