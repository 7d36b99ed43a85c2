"""`replk inspect`: a checkpoint opened, described and counted."""

from pathlib import Path

from replk_deploy import checkpoint, sources
from replk_deploy import inspect as inspection
from replk_deploy.container import Source
from replk_deploy.inspect import Inspection


def inspect(
    path: Path | str, *, source: Source = "model", head: str | None = None, size: sources.Size | None = None
) -> Inspection:
    """Say what a checkpoint is and what it costs."""
    return inspection.inspect(checkpoint.load(path, source=source, head=head), size=size)
