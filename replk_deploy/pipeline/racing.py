"""A network that is not ours, written as a file that a backend opens, so that it can be timed beside ours."""

import dataclasses
from pathlib import Path
from typing import final

from replk_deploy import build as construction
from replk_deploy import export as exporting
from replk_deploy import graph, sources, weights
from replk_deploy import proof as proving
from replk_deploy.backends import sidecar
from replk_deploy.backends.base import Backend, Engine, Recipe
from replk_deploy.batch import DYNAMIC
from replk_deploy.metadata import Metadata
from replk_deploy.models import baselines
from replk_deploy.precision import Precision
from replk_deploy.progress import Progress
from replk_deploy.proof import Oracle


def label(name: str) -> str:
    """Return what the rows of a network named as `timm:NAME` are called."""
    return name.partition(":")[2]


@final
class Peer:
    """A network of another library with seeded random weights, and its float64 form, which answers once for all."""

    def __init__(self, name: str, progress: Progress) -> None:
        """Build the network named as `timm:NAME`.

        Raises:
            ReplkError: nobody knows the name.
            UnavailableError: the library of that network is not installed.
        """
        progress(f"baseline {name}", 0, None)
        self._name, self.label = name, label(name)
        self._network, self._preprocessing = baselines.baseline(name)
        self.oracle = Oracle(self._network, weights.content_hash(self._network))

    def fits(self, kind: type[Backend]) -> bool:
        """Tell whether a backend runs such a network."""
        return kind.families is None or self._network.family in kind.families

    def write(
        self, kind: type[Backend], precision: Precision, folder: Path, progress: Progress
    ) -> tuple[Path, Metadata]:
        """Write the file that a backend opens."""
        network, preprocessing = self._network, self._preprocessing
        metadata = Metadata(
            family=network.family,
            form=network.form,
            geometry=network.describe(),
            label=network.geometry.label,
            precision=precision,
            preprocessing=preprocessing,
            source_sha256=self.oracle.sha256,
            source_name=self._name,
        )
        ending = sources.starts_from(kind)
        path = folder / f"{self.label}.{precision}{ending}"
        if path.exists():
            pass
        elif ending == ".safetensors":
            weights.write(path, proving.cast(network, precision), metadata)
        else:
            metadata = dataclasses.replace(metadata, batch=str(DYNAMIC))
            exporting.export(network, path, precision=precision, size=preprocessing.size, batch=DYNAMIC, embed=None)
            graph.seal(path, metadata)
        if issubclass(kind, Engine):
            source, path = path, folder / f"{self.label}.{precision}.{kind.name}{kind.suffix}"
            made = construction.build(source, path, kind, recipe=Recipe(), progress=progress)
            sidecar.write(path, made.sidecar)
        return path, metadata
