"""What a large convolution costs on a runtime in each of its forms, and which form is therefore taken.

Times come from calibrations: one record per machine, of single layers on one runtime. A layer that was measured
at this batch costs what was measured, and one that was measured at others costs what it did there. Any other costs
what a sum of five terms says, whose factors are fitted to the measured layers of the same runtime, device,
precision and form:

    t = a + b·bytes(weight) + c·bytes(maps) + d·outputs·k + e·multiply-adds

No factor is negative, and the fit minimises relative errors. A form is taken in place of the convolution only when
it gains more than a measurement can be wrong by, or than the fit was wrong on any layer that it had not seen.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from scipy.optimize import nnls

from replk_deploy import files, records
from replk_deploy.errors import IntegrityError
from replk_deploy.lowerings import LOWERINGS, NONE
from replk_deploy.lowerings.base import LargeConv
from replk_deploy.lowerings.grouped import Grouped
from replk_deploy.lowerings.strip import Strip
from replk_deploy.precision import TOLERANCES, Precision

FORMS = (NONE, *LOWERINGS)
ALIKE = {"torch-compile": "torch", "aoti": "torch"}  # a compiler leaves convolutions and products to the same libraries
NEAR: dict[Precision, Precision] = {"bf16": "fp16"}  # bytes and matrix rates are the same
CPU = "cpu"  # first word of what a processor is called
MEASURED, MODELLED = 0.9, 0.75  # share of the convolution's time that a form may take, to be taken in its place
FACTORS = 5  # of the sum
REACH = 4  # times more or less work than any layer that was measured; a fit says nothing of what lies beyond
FILE = "calibration.json"  # of the machine, in the folder of the runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Time of one layer on one runtime; `taps` is the kernel as cropped, `device` the GPU's name or cpu."""

    runtime: str
    device: str
    precision: Precision
    batch: int
    channels: int
    taps: tuple[int, int]
    map: tuple[int, int]
    form: str
    ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What was measured on one machine."""

    KIND: ClassVar[str] = "calibration"
    FORMAT: ClassVar[int] = 1

    environment: Mapping[str, Any]
    costs: tuple[Cost, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Which form a large convolution takes, and why.

    Attributes:
        ms: time of each form that applies, as the decision takes it; empty where nothing is known.
        measured: whether these were measured for this very layer and batch.
    """

    DERIVED: ClassVar[tuple[str, ...]] = ("gain_ms",)

    site: LargeConv
    form: str
    why: str
    ms: Mapping[str, float]
    measured: bool

    @property
    def gain_ms(self) -> float:
        """Return the expected gain over the convolution."""
        return self.ms[NONE] - self.ms[self.form] if self.form in self.ms else 0.0


def calibrations(folder: Path | None = None) -> tuple[Calibration, ...]:
    """Read what is known of runtimes: the record in a folder of runs first, then those that come with the package.

    Raises:
        IntegrityError: a record is damaged or of a newer version.
    """
    shipped = resources.files("replk_deploy") / "calibrations"
    own = [] if folder is None or not (folder / FILE).is_file() else [folder / FILE]
    return tuple(read(path) for path in (*own, *sorted(Path(str(shipped)).glob("*.json"))))


def read(path: Path) -> Calibration:
    """Read one record.

    Raises:
        IntegrityError: not a calibration, damaged, or of a newer version.
    """
    record = records.read(path, Calibration.KIND, Calibration.FORMAT)
    try:
        costs: list[dict[str, Any]] = record["costs"]
        return Calibration(environment=record["environment"], costs=tuple(_cost(**cost) for cost in costs))
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as exc:
        raise IntegrityError(f"{path} is damaged: {exc}", "make it again: replk lower --calibrate") from exc


def add(path: Path, found: Calibration) -> None:
    """Write a calibration into a record, in place of what the record says of the same layers.

    Raises:
        IntegrityError: the record that is there is damaged or of a newer version.
    """
    kept = {dataclasses.replace(cost, ms=0.0): cost for cost in (read(path).costs if path.is_file() else ())}
    kept |= {dataclasses.replace(cost, ms=0.0): cost for cost in found.costs}
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, records.to_json(dataclasses.replace(found, costs=tuple(kept.values()))))


def forms_of(site: LargeConv) -> list[str]:
    """Name the forms that a convolution can take: strips only where they compute less than whole columns."""
    able = [form for form in FORMS if form == NONE or LOWERINGS[form].refusal(site) is None]
    return [form for form in able if form != Strip.name or Strip.macs(site) < Grouped.macs(site)]


class Model:
    """What one runtime costs on one device at one precision."""

    def __init__(self, known: Iterable[Calibration], runtime: str, device: str, precision: Precision) -> None:
        """Take what fits, the best first: this very device before its kind, this precision before its like."""
        self._precision = precision
        self._device = device
        self._records: list[tuple[Cost, ...]] = []
        sources = []
        wanted = ALIKE.get(runtime, runtime)
        for like in dict.fromkeys((precision, NEAR.get(precision, precision))):
            fitting = [
                (name, costs)
                for calibration in known
                for name, costs in _by_device(calibration, wanted, like).items()
                if _speaks_for(name, device)
            ]
            for name, costs in sorted(fitting, key=lambda found: found[0] != device):
                self._records.append(costs)
                sources.append(f"{like} on {name}")
        self.source = "; ".join(dict.fromkeys(sources))

    def times(self, site: LargeConv, batch: int) -> tuple[Mapping[str, float], str]:
        """Return the milliseconds of each form that applies, and how they are known; empty when nothing is.

        A layer that was measured at other batches only costs, relative to the convolution, what it cost at the next
        smaller and the next larger one, whichever speaks more against the form; below the smallest nothing is known.
        """
        forms = forms_of(site)
        for find in (self._measured, self._between, self._modelled):
            for costs in self._records:
                times, how = find(costs, site, batch)
                if NONE in times and len(times) > 1:
                    how += "" if costs[0].device == self._device else " on another device"
                    return {form: times[form] for form in forms if form in times}, how
        return {}, ""

    def _measured(self, costs: tuple[Cost, ...], site: LargeConv, batch: int) -> tuple[Mapping[str, float], str]:
        return {cost.form: cost.ms for cost in costs if _same(cost, site) and cost.batch == batch}, "measured"

    def _between(self, costs: tuple[Cost, ...], site: LargeConv, batch: int) -> tuple[Mapping[str, float], str]:
        met = sorted({cost.batch for cost in costs if _same(cost, site) and cost.form == NONE})
        below, above = [b for b in met if b < batch][-1:], [b for b in met if b > batch][:1]
        if not below:
            return {}, ""
        times = [self._measured(costs, site, b)[0] for b in (*below, *above)]
        ratios = {form: max(t[form] / t[NONE] for t in times) for form in times[0] if all(form in t for t in times)}
        where = " and ".join(map(str, (*below, *above)))
        return {form: ratio * times[0][NONE] for form, ratio in ratios.items()}, f"measured at batch {where}"

    def _modelled(self, costs: tuple[Cost, ...], site: LargeConv, batch: int) -> tuple[Mapping[str, float], str]:
        """Take the fits, each moved against the form by the most that it was wrong on a layer left out."""
        work = [_macs(_site(cost), cost.batch) for cost in costs if cost.form == NONE]
        if not work or not min(work) / REACH <= _macs(site, batch) <= max(work) * REACH:
            return {}, ""
        times = {}
        for form in forms_of(site):
            factors, slower, faster = _fit(tuple(cost for cost in costs if cost.form == form), self._precision)
            if factors is not None:
                fitted = float(factors @ _terms(form, site, batch, self._precision))
                times[form] = fitted / faster if form == NONE else fitted * slower
        return times, "modelled"


@functools.lru_cache(maxsize=64)
def _fit(rows: tuple[Cost, ...], precision: Precision) -> tuple[Any, float, float]:
    """Fit the factors of a form; how many times slower and faster a layer left out was than the rest would say.

    None where fewer layers were measured than there are factors, and one to leave out.
    """
    if len(rows) <= FACTORS:
        return None, math.inf, math.inf
    terms = np.array([_terms(cost.form, _site(cost), cost.batch, precision) for cost in rows])
    times = np.array([cost.ms for cost in rows])
    scale = np.abs(terms).max(axis=0)

    def solve(kept: Any) -> Any:
        return nnls((terms / scale / times[:, None])[kept], np.ones(kept.sum()))[0] / scale

    everything = np.ones(len(rows), bool)
    off = []
    for index in range(len(rows)):
        kept = everything.copy()
        kept[index] = False
        off.append(times[index] / max(float(solve(kept) @ terms[index]), 1e-9))
    return solve(everything), max(1.0, *off), max(1.0, *(1 / ratio for ratio in off))


def decide(
    sites: Sequence[LargeConv],
    model: Model,
    *,
    batch: int,
    precision: Precision,
    weight_bytes: int,
    max_growth: float,
) -> tuple[Decision, ...]:
    """Choose a form for each large convolution of a network.

    Where all choices together would make the weights more than `max_growth` times as large, those that gain
    the least time for their bytes are given up.

    Args:
        sites: of the network.
        model: of the runtime.
        batch: images at a time.
        precision: of the weights.
        weight_bytes: of the whole network.
        max_growth: of the weights, in total.
    """
    itemsize = TOLERANCES[precision].torch_dtype.itemsize
    options = [_options(site, model, batch) for site in sites]
    chosen = [ranked[0] for ranked in options]
    budget = max(max_growth - 1, 0) * weight_bytes
    while sum(_added(d, itemsize) for d in chosen) > budget:
        growing = [i for i, d in enumerate(chosen) if _added(d, itemsize) > 0]
        index = min(growing, key=lambda i: chosen[i].gain_ms / _added(chosen[i], itemsize))
        now = _added(chosen[index], itemsize)
        smaller = [d for d in options[index] if _added(d, itemsize) < now]
        given_up = f"{chosen[index].form} would pass {max_growth:g} times the weights"
        chosen[index] = dataclasses.replace(smaller[0], why=given_up)
    return tuple(chosen)


def _cost(*, taps: Sequence[int], map: Sequence[int], ms: float, **rest: Any) -> Cost:  # noqa: A002  # the name of the field
    return Cost(taps=(taps[0], taps[1]), map=(map[0], map[1]), ms=float(ms), **rest)


def _options(site: LargeConv, model: Model, batch: int) -> list[Decision]:
    """Return the forms that are worth taking, the best first, the convolution as it is last."""
    times, why = model.times(site, batch)
    if NONE not in times:
        return [Decision(site=site, form=NONE, why="nothing like it was measured", ms={}, measured=False)]
    measured = why == "measured"
    limit = (MEASURED if measured else MODELLED) * times[NONE]
    worth = sorted((form for form in times if form != NONE and times[form] <= limit), key=lambda form: times[form])
    return [
        Decision(
            site=site,
            form=form,
            why=why if form != NONE or not worth else "",
            ms=times,
            measured=measured,
        )
        for form in (*worth, NONE)
    ]


def added_elements(site: LargeConv, form: str) -> int:
    """Count the elements that a form adds to the weight of a convolution."""
    return 0 if form == NONE else LOWERINGS[form].elements(site) - site.channels * math.prod(site.kernel)


def _added(decision: Decision, itemsize: int) -> int:
    return itemsize * added_elements(decision.site, decision.form)


def _macs(site: LargeConv, batch: int) -> int:
    return batch * site.channels * math.prod(site.map) * math.prod(site.taps)


def on_cpu(device: str) -> bool:
    """Tell whether a device of a calibration is a processor."""
    return device.startswith(CPU)


def _speaks_for(measured: str, device: str) -> bool:
    """Tell whether times of one device say something of another: of GPUs yes, of other processors nothing."""
    return measured == device or not (on_cpu(measured) or on_cpu(device))


def _by_device(calibration: Calibration, runtime: str, precision: Precision) -> Mapping[str, tuple[Cost, ...]]:
    """Return what was measured of a runtime at a precision, by device."""
    found: dict[str, tuple[Cost, ...]] = {}
    for cost in calibration.costs:
        if cost.runtime == runtime and cost.precision == precision:
            found[cost.device] = (*found.get(cost.device, ()), cost)
    return found


def _same(cost: Cost, site: LargeConv) -> bool:
    return (cost.channels, cost.taps, cost.map) == (site.channels, site.taps, site.map)


def _site(cost: Cost) -> LargeConv:
    return LargeConv(name="", channels=cost.channels, kernel=cost.taps, map=cost.map)


def _terms(form: str, site: LargeConv, batch: int, precision: Precision) -> Any:
    """Return the five terms of a form."""
    size = TOLERANCES[precision].torch_dtype.itemsize
    outputs = batch * site.channels * math.prod(site.map)
    taps = site.channels * math.prod(site.taps)
    macs = outputs * math.prod(site.taps) if form == NONE else batch * LOWERINGS[form].macs(site)
    weight = taps if form == NONE else LOWERINGS[form].elements(site)
    return np.array([1.0, weight * size, 2 * outputs * size, outputs * site.taps[1], macs], np.float64)
