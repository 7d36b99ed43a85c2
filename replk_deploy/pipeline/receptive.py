"""`replk erf`: a checkpoint → its effective receptive field as trained and as fused."""

import dataclasses
from pathlib import Path

import numpy as np
import torch

from replk_deploy import charts, checkpoint, files, images, sources
from replk_deploy import erf as measuring
from replk_deploy import fuse as fusing
from replk_deploy import proof as proving
from replk_deploy import verify as verifying
from replk_deploy.checkpoint import Loaded
from replk_deploy.container import Source
from replk_deploy.erf import Receptive
from replk_deploy.errors import ReplkError
from replk_deploy.images import Pictures
from replk_deploy.models.base import Network
from replk_deploy.pipeline import entries
from replk_deploy.progress import Progress, silent


def erf(
    path: Path,
    *,
    output: Path | None = None,
    source: Source = "model",
    head: str | None = None,
    size: sources.Size | None = None,
    data: Path | None = None,
    count: int = 8,
    progress: Progress = silent,
) -> Receptive:
    """Measure the receptive field of a checkpoint before and after fusion; draw it at `output`.

    Raises:
        ReplkError: the file cannot be taken, or the picture has no known ending.
    """
    if output is not None and output.suffix != ".svg":
        raise ReplkError(f"{output} does not end in .svg", "name a .svg file")
    loaded = checkpoint.load(path, source=source, head=head)
    pictures = images.read(data, classes=loaded.model.geometry.classes) if data else None
    fused = fusing.fuse(loaded.model).model
    found = of_networks(loaded, fused, size=size, pictures=pictures, count=count, progress=progress)
    if output is not None:
        entries.spare(path, output)
        drawn = charts.fields([(f.network, f.cells) for f in found.fields])
        files.write_text(output, charts.standalone(drawn))
    return found


def of_networks(
    loaded: Loaded,
    fused: Network,
    *,
    size: sources.Size | None,
    pictures: Pictures | None,
    count: int = 8,
    progress: Progress = silent,
) -> Receptive:
    """Measure the field of an open checkpoint and of its fused form, both in float32.

    Without pictures it is shown seeded noise.
    """
    rules, size = loaded.preprocessing, size or loaded.preprocessing.size
    if pictures:
        rules = dataclasses.replace(rules, size=size)
        pixels, _ = next(pictures.batches(count, rules))
        shown, normal = f"the first {len(pixels)} pictures of {pictures.source.name}", rules.normalise(pixels)
    else:
        shown, normal = "seeded normal noise", verifying.normal(size, count=count).images.astype(np.float32)
    networks = {"trained": proving.cast(loaded.model, torch.float32), "fused": proving.cast(fused, torch.float32)}
    return measuring.erf(
        networks,  # type: ignore[arg-type]  # a dict of str has the two names
        normal,
        label=loaded.label,
        sha256=loaded.sha256,
        shown=shown,
        progress=progress,
    )
