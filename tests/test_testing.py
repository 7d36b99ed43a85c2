"""What other projects' tests call: it lets the right pair pass, and fails in words for a planted bug."""

from pathlib import Path

import pytest
import torch

from replk_deploy import pipeline
from replk_deploy.errors import ReplkError
from replk_deploy.testing import assert_equivalent
from tests import networks


def test_a_planted_bug_is_an_assertion_and_a_missing_file_is_not(tmp_path: Path) -> None:
    trained = networks.trained()
    ckpt = networks.save_as_trained(trained, tmp_path / "ckpt.pth")
    fused = pipeline.fuse(ckpt, root=tmp_path / "runs").file
    assert assert_equivalent(str(ckpt), fused).state == "pass"

    with torch.no_grad():
        trained.stages[1].blocks[0].large_kernel.lkb_origin.bn.running_mean[0] += 0.5
    other = networks.save_as_trained(trained, tmp_path / "other.pth")
    with pytest.raises(AssertionError, match=r"fused\.safetensors does not compute what .*other\.pth does: .*limit"):
        assert_equivalent(other, fused)

    exported = pipeline.export(fused, root=tmp_path / "runs").file
    with pytest.raises(AssertionError, match=r"nothing proves that .*\.onnx computes what"):
        assert_equivalent(exported, exported)

    fewer = networks.save_as_trained(networks.trained(networks.LIKE_XL), tmp_path / "xl.pth")
    with pytest.raises((AssertionError, ReplkError)):
        assert_equivalent(fewer, fused)
    with pytest.raises(ReplkError, match="missing"):
        assert_equivalent(ckpt, tmp_path / "missing.onnx")
