"""What a file of ours says of itself: origin, shape, preprocessing, precision and verdict.

The same fields stand in the header of safetensors files and in the metadata of ONNX files, each
under `replk.<name>`.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from replk_deploy import __version__
from replk_deploy.models.base import Form
from replk_deploy.precision import PRECISIONS, Precision
from replk_deploy.preprocess import Preprocessing

State = Literal["pass", "rejected", "provisional", "unverified"]
PREFIX = "replk."
SIDE = 10**5  # pixels; --size takes five digits


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a verification found; it speaks only of the content whose hash it carries.

    Attributes:
        state: only `pass` lets an artefact be timed or stand in for its source.
        content: SHA-256 of the weights, or of graph and weights, that were judged.
        reference: SHA-256 of the file it was judged against.
        worst: largest share of the allowance that was used; above 1 is a rejection.
        why: one sentence.
    """

    state: State
    content: str
    reference: str
    worst: float | None
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Metadata:
    """What a file of ours says of itself.

    Attributes:
        batch: the range of an ONNX file, as Batch.parse reads it.
        lowered: which forms large convolutions took, in words; empty when they are what they were.
    """

    family: str
    form: Form
    geometry: str
    label: str
    precision: Precision
    preprocessing: Preprocessing
    source_sha256: str
    source_name: str
    selected: str = ""
    batch: str = ""
    lowered: str = ""
    version: str = __version__
    verdict: Verdict | None = None

    def to_strings(self) -> dict[str, str]:
        """Return the fields as text for a file header."""
        fields = dataclasses.asdict(self)
        return {
            f"{PREFIX}{k}": v if isinstance(v, str) else json.dumps(v, sort_keys=True)
            for k, v in fields.items()
            if v is not None
        }

    @classmethod
    def from_strings(cls, header: Mapping[str, str]) -> Self | None:
        """Read the fields back; None when the header is not ours, ValueError when it is damaged."""
        found: dict[str, Any] = {k.removeprefix(PREFIX): v for k, v in header.items() if k.startswith(PREFIX)}
        if not found:
            return None
        try:
            said: dict[str, Any] = json.loads(found["preprocessing"])
            said = {k: tuple(v) if isinstance(v, list) else v for k, v in said.items()}
            found["preprocessing"] = Preprocessing(**said)
            if "verdict" in found:
                found["verdict"] = Verdict(**json.loads(found["verdict"]))
            made = cls(**{k: v for k, v in found.items() if k in {f.name for f in dataclasses.fields(cls)}})
            wrong = _wrong(made)
        except (KeyError, TypeError, AttributeError, OverflowError, RecursionError, json.JSONDecodeError) as exc:
            raise ValueError(f"its replk header is damaged: {exc}") from exc
        if wrong:
            raise ValueError(f"its replk header is damaged: {', '.join(wrong)}")
        return made


def _wrong(made: Metadata) -> list[str]:
    """Name the fields that hold what nothing of ours writes there; names of files and lines of CI are made of them."""
    rules, verdict = made.preprocessing, made.verdict
    sound = {
        "form": made.form in get_args(Form),
        "label": made.label.isprintable(),
        "precision": made.precision in PRECISIONS,
        "source_sha256": re.fullmatch("[0-9a-f]{64}", made.source_sha256),
        "selected": re.fullmatch(r"[\w-]*", made.selected),
        "size": _numbers(rules.size, 2) and all(isinstance(side, int) and 0 < side < SIDE for side in rules.size),
        "mean": _numbers(rules.mean, 3),
        "std": _numbers(rules.std, 3) and all(value > 0 for value in rules.std),
        "resize": rules.resize in {"warp", "crop"},
        "crop_pct": _numbers((rules.crop_pct,), 1) and rules.crop_pct > 0,
        "verdict": verdict is None
        or (
            verdict.state in get_args(State)
            and isinstance(verdict.worst, int | float | None)
            and all(isinstance(text, str) for text in (verdict.content, verdict.reference, verdict.why))
        ),
    }
    return [name for name, holds in sound.items() if not holds]


def _numbers(found: Any, count: int) -> bool:
    """Tell whether a header holds so many finite numbers."""
    whole = isinstance(found, tuple) and len(found) == count
    return whole and all(isinstance(v, int | float) and math.isfinite(v) for v in found)
