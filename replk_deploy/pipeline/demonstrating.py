"""`replk demo`: the chain on the checkpoint that comes with the package."""

from pathlib import Path

from replk_deploy.pipeline.deploying import Deployment, deploy
from replk_deploy.progress import Progress, silent
from replk_deploy.workspace import ROOT

SAMPLES = Path(__file__).parents[1] / "samples"


def demo(*, max_seconds: float = 20.0, root: Path = ROOT, progress: Progress = silent) -> Deployment:
    """Take the small trained network of the package through the whole chain, in fp32 and fp16, with its pictures."""
    return deploy(
        SAMPLES / "digits.pth",
        precisions=("fp32", "fp16"),
        data=SAMPLES / "digits-test.npz",
        max_seconds=max_seconds,
        root=root,
        progress=progress,
    )
