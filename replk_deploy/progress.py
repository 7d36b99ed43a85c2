"""How a step says how far it is, without knowing who listens."""

from typing import Protocol


class Progress(Protocol):
    """Listens to a step; called from any thread, returns at once."""

    def __call__(self, step: str, done: int, total: int | None) -> None:
        """Note that `done` of `total` parts of `step` are finished; None when the total is unknown."""


def silent(step: str, done: int, total: int | None) -> None:  # the null listener
    """Listen to nothing."""
