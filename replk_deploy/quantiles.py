"""Quantiles with intervals that assume no distribution.

Of n samples, B ~ Binomial(n, q) fall below the true q-quantile, so two order statistics enclose it
with a probability that depends on n and q alone. Samples are taken as independent; where they are
not, the interval is too narrow, and `wider` with one over block medians is the remedy.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.stats import binom

COVERAGE = 0.95
CLOSE = 1e-9  # the same number, written and read again


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantile:
    """An estimate from n samples, with a 95% interval; None where n is too small for one."""

    DERIVED: ClassVar[tuple[str, ...]] = ("half_width",)

    value: float
    interval: tuple[float, float] | None
    n: int

    @property
    def half_width(self) -> float | None:
        """Give the larger distance from the value to an end of the interval, as a share of the value."""
        if self.interval is None or self.value <= 0:
            return None
        low, high = self.interval
        return max(self.value - low, high - self.value) / self.value

    def wider(self, other: "Quantile") -> "Quantile":
        """Return this value with the interval that encloses both; none when either is missing."""
        if self.interval is None or other.interval is None:
            return Quantile(value=self.value, interval=None, n=self.n)
        (low, high), (lower, higher) = self.interval, other.interval
        return Quantile(value=self.value, interval=(min(low, lower), max(high, higher)), n=self.n)


def ranks(n: int, q: float, coverage: float = COVERAGE) -> tuple[int, int] | None:
    """Return the ranks, from 1, whose order statistics enclose the q-quantile; None when n is too small.

    The lower is the largest l with P(B <= l-1) <= tail, the upper the smallest u with
    P(B <= u-1) >= 1 - tail, with tail = (1 - coverage) / 2.
    """
    tail = (1 - coverage) / 2
    low = int(binom.ppf(tail, n, q))
    if binom.cdf(low, n, q) <= tail:  # met exactly: one rank further still holds
        low += 1
    high = int(binom.ppf(1 - tail, n, q)) + 1
    return (low, high) if low >= 1 and high <= n else None


def quantile(samples: Sequence[float], q: float) -> Quantile:
    """Estimate one quantile of at least one sample."""
    ordered = np.sort(np.asarray(samples, dtype=np.float64))
    found = ranks(len(ordered), q)
    interval = None if found is None else (float(ordered[found[0] - 1]), float(ordered[found[1] - 1]))
    return Quantile(value=float(np.quantile(ordered, q)), interval=interval, n=len(ordered))


def autocorrelation(samples: Sequence[float]) -> float | None:
    """Return the lag-1 autocorrelation; None for fewer than three samples or none that differ."""
    centred = np.asarray(samples, dtype=np.float64) - np.mean(samples)
    power = float(centred @ centred)
    return float(centred[:-1] @ centred[1:]) / power if len(centred) > 2 and power > 0 else None  # noqa: PLR2004


def same(stated: float | None, found: float) -> bool:
    """Tell whether a stated number is the one found."""
    if stated is None or math.isnan(stated):
        return stated is not None and math.isnan(found)
    return math.isclose(stated, found, rel_tol=CLOSE, abs_tol=1e-300)
