"""One thread per test process: two processes share two cores, and sums keep their order."""

import os

os.environ.update({"OMP_NUM_THREADS": "1", "TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "100"})

from pathlib import Path

import pytest
import torch

from tests import networks

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def trained():
    """Return a small RepLKNet in training form that has lived, float32; shared, so never change it."""
    return networks.trained()


@pytest.fixture(scope="session")
def checkpoint_file(tmp_path_factory: pytest.TempPathFactory, trained) -> Path:
    """Return a file saved as the reference training script saves."""
    return networks.save_as_trained(trained, tmp_path_factory.mktemp("ckpt") / "checkpoint-best.pth")


@pytest.fixture
def short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take next to no time over a latency that nobody will read."""
    networks.shorten_timing(monkeypatch)


@pytest.fixture
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run the test in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
