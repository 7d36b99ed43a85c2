"""The exact rewrites that replk knows for a large depthwise convolution."""

from collections import Counter
from collections.abc import Iterable

from replk_deploy.lowerings.base import Lowering
from replk_deploy.lowerings.dense import Dense
from replk_deploy.lowerings.grouped import Grouped
from replk_deploy.lowerings.strip import Strip

NONE = "none"  # the choice to leave a convolution what it is
LOWERINGS: dict[str, type[Lowering]] = {Grouped.name: Grouped, Dense.name: Dense, Strip.name: Strip}


def counted(forms: Iterable[str]) -> str:
    """Say how many convolutions take which form, as `dense 4, grouped 1`; empty where all stay what they are."""
    return ", ".join(f"{form} {count}" for form, count in sorted(Counter(forms).items()) if form != NONE)
