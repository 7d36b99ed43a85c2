"""How many images at a time: fixed, or a range with the number to tune for."""

from dataclasses import dataclass
from typing import Self

from replk_deploy.errors import ReplkError

PARTS = 3  # MIN:OPT:MAX
MOST = 2**16  # more images at a time are a slip of the hand


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """How many images at a time; `opt` is what a runtime should tune for."""

    min: int
    opt: int
    max: int

    @property
    def dynamic(self) -> bool:
        """Tell whether the batch may vary."""
        return self.min != self.max

    def holds(self, count: int) -> bool:
        """Tell whether so many images are within."""
        return self.min <= count <= self.max

    def __str__(self) -> str:
        return f"{self.min}:{self.opt}:{self.max}" if self.dynamic else str(self.max)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read N, MIN:MAX (tuned for MAX) or MIN:OPT:MAX.

        Raises:
            ReplkError: it is none of these.
        """
        parts = text.split(":")
        numbers = [int(p) for p in parts if p.isdecimal() and 0 < int(p) <= MOST]
        if len(numbers) != len(parts) or len(numbers) > PARTS or numbers != sorted(numbers):
            raise ReplkError(f"--batch {text} is not a batch", "write N, MIN:MAX or MIN:OPT:MAX, for example 1:8:64")
        return cls(min=numbers[0], opt=numbers[-2 if len(numbers) == PARTS else -1], max=numbers[-1])


DYNAMIC = Batch(min=1, opt=8, max=64)
