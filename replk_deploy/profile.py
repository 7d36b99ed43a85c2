"""Open backend → the time of each layer, and how far each is from what the device could do.

Watching every layer slows an inference, so the whole is timed apart, unwatched, before and after. What
the layers leave of it is a line of its own, and the sum closes. Times of a runtime's layers meet the
network by name: a node of ours carries the name of the module that it came from.
"""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from replk_deploy import machine
from replk_deploy.backends.base import Array, Backend, Launch, LayerTime
from replk_deploy.errors import ContractError, ReplkError
from replk_deploy.precision import TOLERANCES, Precision
from replk_deploy.progress import Progress, silent
from replk_deploy.quantiles import Quantile, quantile
from replk_deploy.records import live
from replk_deploy.roofline import Clock, Roofline
from replk_deploy.sites import Site, owners

REPEATS = 20
WARM_UPS = 3
SLACK = 0.05  # share of the whole that layers may exceed it by, or leave of it, without a word
OVERDONE = 1.5  # times the whole above which no layer can be told from what watching it costs
DECIDES = 0.3  # share from which the large kernels are what to work on
FAR = 3.0  # times the attainable from which another form of a layer promises more than another device


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One row: what a runtime executes of one module, or of several that it fused.

    Attributes:
        name: of the modules; what the runtime calls it where it belongs to none.
        samples_ms: one value a repetition.
        sites: what it computes, each counted in one row only; empty where that is not known.
        attainable_ms: below which this device cannot be expected to come; None without sites.
        of_ms: what its share is of.
    """

    DERIVED: ClassVar[tuple[str, ...]] = ("ms", "share", "large", "macs", "inside_macs", "ratio")

    name: str
    kind: str
    detail: str
    samples_ms: tuple[float, ...]
    sites: tuple[Site, ...]
    moved_bytes: int | None
    attainable_ms: float | None
    of_ms: float = live()

    @property
    def ms(self) -> Quantile:
        """Give the median of the repetitions with its interval."""
        return quantile(self.samples_ms, 0.5)

    @property
    def share(self) -> float:
        """Give the share of the whole inference, or of all layers where watching made them the larger sum."""
        return self.ms.value / self.of_ms

    @property
    def large(self) -> bool:
        """Tell whether a large depthwise kernel is in it."""
        return any(site.large for site in self.sites)

    @property
    def macs(self) -> int:
        """Count the multiply-adds, padding counted."""
        return sum(site.macs for site in self.sites)

    @property
    def inside_macs(self) -> int:
        """Count the multiply-adds that touch the map."""
        return sum(site.inside_macs for site in self.sites)

    @property
    def ratio(self) -> float | None:
        """Give the time over the attainable one; None where that is not known."""
        return self.ms.value / self.attainable_ms if self.attainable_ms else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Where the time of one backend at one batch goes.

    Attributes:
        clock: of the whole; `device` between two events of a GPU.
        before_ms: of whole inferences, unwatched, before the layers were timed.
        after_ms: the same afterwards.
        layers: in the order of execution.
        lost: sites that no layer of the runtime was found for.
    """

    KIND: ClassVar[str] = "profile"
    FORMAT: ClassVar[int] = 1
    DERIVED: ClassVar[tuple[str, ...]] = (
        *("whole_ms", "watched_ms", "layers_ms", "unattributed_ms"),
        *("large_ms", "large_share", "large_ratio", "sentence", "unstable", "doubts"),
    )

    environment: Mapping[str, machine.Fact]
    backend: str
    device: Literal["cpu", "cuda"]
    precision: Precision
    shape: tuple[int, ...]
    facts: Mapping[str, str]
    roofline: Roofline
    clock: Literal["host", "device"]
    before_ms: tuple[float, ...]
    after_ms: tuple[float, ...]
    layers: tuple[Layer, ...]
    lost: tuple[Site, ...]

    @property
    def whole_ms(self) -> Quantile:
        """Give the median of the unwatched inferences."""
        return quantile((*self.before_ms, *self.after_ms), 0.5)

    @property
    def watched_ms(self) -> Quantile:
        """Give the median of what the layers of one inference add up to."""
        return quantile([sum(column) for column in zip(*(layer.samples_ms for layer in self.layers), strict=True)], 0.5)

    @property
    def layers_ms(self) -> float:
        """Add up the medians of the layers."""
        return sum(layer.ms.value for layer in self.layers)

    @property
    def of_ms(self) -> float:
        """Give what shares are of: the whole, or the sum of the layers where watching made that larger."""
        return max(self.whole_ms.value, self.layers_ms)

    @property
    def unattributed_ms(self) -> float:
        """Give what the layers leave of the whole; negative where watching them cost more than that."""
        return self.whole_ms.value - self.layers_ms

    @property
    def large_ms(self) -> float:
        """Add up the layers with a large depthwise kernel."""
        return sum(layer.ms.value for layer in self.layers if layer.large)

    @property
    def large_share(self) -> float:
        """Give the share of the large depthwise kernels in the whole, or in all layers where they are more."""
        return self.large_ms / self.of_ms

    @property
    def large_ratio(self) -> float | None:
        """Give the time of the large depthwise kernels over their attainable one; None without any."""
        attainable = sum(layer.attainable_ms or 0.0 for layer in self.layers if layer.large)
        return self.large_ms / attainable if attainable else None

    @property
    def sentence(self) -> str:
        """Say what share the large depthwise kernels have, and what follows from it."""
        ratio = self.large_ratio
        if ratio is None:
            hidden = any(site.large for site in self.lost) or not any(layer.sites for layer in self.layers)
            known = (
                "it is not known which layers are large depthwise kernels" if hidden else "no large depthwise kernel"
            )
            return f"{known}; {self._rest}"
        found = f"large depthwise kernels: {self.large_ms:.3g} of {self.of_ms:.3g} ms, {self.large_share:.0%}"
        times = f"{ratio:.2g}x what this device could do"
        if self.large_share < DECIDES:
            return f"{found}, {times}: the rest decides; {self._rest}"
        if ratio < FAR:
            return f"{found}, {times}: little is left in them; a lower precision or another device is"
        return f"{found}, {times}: their form decides; compare runtimes first: replk bench --backend B"

    @property
    def unstable(self) -> bool:
        """Tell whether the numbers show the machine rather than the network; `doubts` say by what."""
        whole, watched = self.whole_ms.value, self.watched_ms.value
        moved = max(self._sides) - min(self._sides)
        return watched > OVERDONE * whole or max(watched - self.layers_ms, moved) > SLACK * whole

    @property
    def _sides(self) -> tuple[float, float]:
        """Give the whole before and after the layers."""
        return quantile(self.before_ms, 0.5).value, quantile(self.after_ms, 0.5).value

    @property
    def doubts(self) -> tuple[str, ...]:
        """Say in words what speaks against the numbers; empty when nothing does."""
        whole, watched, found = self.whole_ms.value, self.watched_ms.value, []
        missing = [site.name for site in self.lost if site.large]
        if missing:
            found.append(
                f"{len(missing)} large kernels are in no layer that {self.backend} names, as {missing[0]}: the share of"
                " the large kernels is a lower bound"
            )
        if watched - whole > SLACK * whole:
            found.append(
                f"the layers add up to {watched / whole:.0%} of the whole: watching them takes time, so compare them"
                " with one another only"
            )
        elif whole - watched > SLACK * whole:
            found.append(f"{1 - watched / whole:.0%} of the whole is in no layer: between them, or in what has no name")
        if watched - self.layers_ms > SLACK * whole:
            found.append(
                f"the layers of one inference take {watched:.3g} ms, their medians add up to {self.layers_ms:.3g}:"
                " something interrupts now this layer, now that one. Quiet the machine"
            )
        sides = self._sides
        if max(sides) - min(sides) > SLACK * whole:
            found.append(
                f"the whole took {sides[0]:.3g} ms before and {sides[1]:.3g} ms after the layers: is the machine"
                " shared? Repeat with more --repeats"
            )
        return tuple(found)

    @property
    def _rest(self) -> str:
        """Name the kind of layer that takes most, large kernels left out."""
        kinds: dict[str, float] = {}
        for layer in self.layers:
            if not layer.large:
                kinds[layer.kind] = kinds.get(layer.kind, 0.0) + layer.share
        if not kinds:
            return "nothing else is named"
        kind = max(kinds, key=lambda name: kinds[name])
        return f"most is {kind}, {kinds[kind]:.0%}"


def profile(
    backend: Backend,
    images: Array,
    *,
    sites: Mapping[str, Site],
    roofline: Roofline,
    repeats: int = REPEATS,
    clock: Clock = time.perf_counter_ns,
    progress: Progress = silent,
) -> Profile:
    """Time the layers of an open backend, and the whole before and after.

    Args:
        backend: open; without a CUDA graph, in which no layer can be told.
        images: one batch.
        sites: what the network computes for this batch, from `sites.of_network` or `sites.of_file`.
        roofline: of this device at the backend's precision.
        repeats: of the layers, and of the whole on each side.
        clock: host clock in nanoseconds.
        progress: told after each of the three parts.

    Raises:
        ReplkError: no repetition, or images that the backend does not take.
        UnavailableError: the runtime does not tell its layers apart.
    """
    if repeats < 1:
        raise ReplkError(f"{repeats} repetitions tell nothing", "give --repeats 1 or more")
    if (roofline.device, roofline.precision) != (backend.device, backend.precision):
        raise ContractError(f"a roofline of {roofline.device} {roofline.precision} for {backend.name}")
    launch = backend.prepare(images)
    before = _whole(launch, repeats, clock)
    progress("profile", 1, 3)
    times = backend.layer_times(images, repeats=repeats)
    progress("profile", 2, 3)
    after = _whole(launch, repeats, clock)
    progress("profile", 3, 3)
    whole_ms = quantile((*before, *after), 0.5).value
    layers = tuple(_rows(times, sites, roofline, repeats, whole_ms))
    of_ms = max(whole_ms, sum(layer.ms.value for layer in layers))
    layers = tuple(dataclasses.replace(layer, of_ms=of_ms) for layer in layers)
    counted = {site.name for layer in layers for site in layer.sites}
    return Profile(
        environment=machine.environment(),
        backend=backend.name,
        device=backend.device,
        precision=backend.precision,
        shape=images.shape,
        facts=backend.facts,
        roofline=roofline,
        clock="host" if launch.device_ms() is None else "device",
        before_ms=before,
        after_ms=after,
        layers=layers,
        lost=tuple(site for name, site in sites.items() if name not in counted),
    )


def _whole(launch: Launch, repeats: int, clock: Clock) -> tuple[float, ...]:
    found = []
    for _ in range(WARM_UPS + repeats):
        start = clock()
        launch.enqueue()
        launch.wait()
        host_ms, device_ms = (clock() - start) / 1e6, launch.device_ms()
        found.append(host_ms if device_ms is None else device_ms)
    return tuple(found[WARM_UPS:])


def _rows(
    times: Sequence[LayerTime], sites: Mapping[str, Site], roofline: Roofline, repeats: int, whole_ms: float
) -> Iterator[Layer]:
    """Join the layers of one module into a row; a site that several rows hold counts in the first."""
    groups: dict[tuple[str, ...], list[LayerTime]] = {}
    for timed in times:
        if len(timed.samples_ms) != repeats:
            raise ContractError(f"{timed.name} has {len(timed.samples_ms)} times, asked for {repeats}")
        groups.setdefault(owners(timed.name, sites) or (timed.name,), []).append(timed)
    if not groups:
        raise ContractError("a runtime that tells its layers apart told none")
    counted: set[str] = set()
    size = int(TOLERANCES[roofline.precision].torch_dtype.itemsize)
    for names, group in groups.items():
        own = tuple(sites[name] for name in names if name in sites and name not in counted)
        counted |= {site.name for site in own}
        moved = size * sum(site.elements for site in own)
        macs = sum(site.inside_macs for site in own)
        yield Layer(
            name=" + ".join(names),
            kind=" + ".join(dict.fromkeys(timed.kind for timed in group)),
            detail="; ".join(dict.fromkeys(timed.detail for timed in group if timed.detail)),
            samples_ms=tuple(map(sum, zip(*(timed.samples_ms for timed in group), strict=True))),
            sites=own,
            moved_bytes=moved if own else None,
            attainable_ms=roofline.attainable_ms(moved_bytes=moved, macs=macs) if own else None,
            of_ms=whole_ms,
        )
