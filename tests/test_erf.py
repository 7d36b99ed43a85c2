"""The receptive field is that of the pixels which matter, whatever the form of the network."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from replk_deploy import cli
from replk_deploy.erf import contributions, erf
from replk_deploy.errors import ReplkError
from replk_deploy.fuse import fuse
from replk_deploy.pipeline import receptive
from replk_deploy.proof import cast

SIZE = 32


class OneConv(nn.Module):
    """A network of one convolution, whose field is known."""

    def __init__(self, taps: list[tuple[int, int]], side: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 1, side, padding=side // 2, bias=False)
        self.conv.weight.data.zero_()
        for y, x in taps:
            self.conv.weight.data[:, :, side // 2 + y, side // 2 + x] = 1.0

    def blocks(self):
        yield "conv"


def images(count: int = 2) -> np.ndarray:
    return np.random.default_rng(0).uniform(0.5, 1, (count, 3, SIZE, SIZE)).astype(np.float32)


@pytest.mark.parametrize("taps", [[(0, 0)], [(-1, 2)], [(2, -2), (0, 1)]])
def test_a_pixel_counts_exactly_where_the_kernel_looks(taps: list[tuple[int, int]]) -> None:
    found = contributions(OneConv(taps), images())
    expected = np.zeros((SIZE, SIZE))
    for y, x in taps:
        expected[SIZE // 2 + y, SIZE // 2 + x] = 1
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_the_smallest_square_that_holds_a_share_is_found() -> None:
    everywhere = [(y, x) for y in range(-2, 3) for x in range(-2, 3)]
    fields = erf({"trained": OneConv(everywhere)}, images()).fields[0].squares
    assert [(s.share, s.height, s.width) for s in fields] == [(0.2, 3, 3), (0.3, 3, 3), (0.5, 5, 5), (0.99, 5, 5)]
    assert fields[-1].area == 25 / SIZE**2


def test_what_only_lowers_the_answer_or_is_cut_off_does_not_count() -> None:
    network = OneConv([(0, 0), (1, 1)])
    network.conv.weight.data[:, :, 3, 3] = -0.1
    assert np.count_nonzero(contributions(network, images())) == 1
    network.conv.weight.data.neg_()
    with pytest.raises(ReplkError, match="no pixel"):
        contributions(network, images())


def test_fusion_leaves_the_field_and_a_planted_bug_does_not(trained) -> None:
    model = cast(trained, torch.float64)
    fused = fuse(model).model
    shown = np.random.default_rng(0).standard_normal((2, 3, 64, 64)).astype(np.float32)
    found = erf({"trained": model, "fused": fused}, shown)
    assert found.apart < 1e-9
    wrong = fuse(model).model
    kernel = next(m for m in wrong.modules() if isinstance(m, nn.Conv2d) and m.kernel_size[0] > 9)
    kernel.weight.data = torch.roll(kernel.weight.data, 1, dims=-1)
    assert erf({"trained": model, "fused": wrong}, shown).apart > 1e-3


@pytest.mark.usefixtures("in_empty_folder")
def test_a_fusion_that_moves_the_field_is_rejected(checkpoint_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = receptive.fusing.fuse

    def mirrored(*args: Any) -> Any:
        made = right(*args)
        for module in made.model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data = module.weight.data.flip(-1)
        return made

    monkeypatch.setattr(receptive.fusing, "fuse", mirrored)
    done = CliRunner().invoke(cli.app, ["erf", str(checkpoint_file), "--images", "1", "--json", "erf.json"])
    assert done.exit_code == 3, done.output
    assert done.stdout.splitlines()[-1].startswith("FAIL erf ")
    assert json.loads(Path("erf.json").read_text())["state"] == "rejected"


@pytest.mark.usefixtures("in_empty_folder")
def test_the_command_draws_and_records(checkpoint_file: Path) -> None:
    done = CliRunner().invoke(
        cli.app, ["erf", str(checkpoint_file), "--images", "1", "-o", "field.svg", "--json", "erf.json"]
    )
    assert done.exit_code == 0, done.output
    said = json.loads(Path("erf.json").read_text())
    assert [f["network"] for f in said["fields"]] == ["trained", "fused"]
    assert said["apart"] < 1e-4
    svg = Path("field.svg").read_text()
    assert "<svg" in svg
    assert "var(" not in svg
    refused = CliRunner().invoke(cli.app, ["erf", str(checkpoint_file), "-o", "field.png"])
    assert refused.exit_code == 2
    assert not Path("field.png").exists()
