"""Every way in which replk says no.

ReplkError                 2  a request or an input that cannot be taken
├── CheckpointError        2  the weights file is damaged, foreign or incomplete
├── MismatchError          3  an artefact does not compute what its source computes
├── UnavailableError       5  a package, device or driver is missing or unable
├── IntegrityError         6  a file is not what its record says, or nothing vouches for it
└── InconclusiveError      7  the noise is too large to answer
ContractError                 our own bug: outside the tree, it keeps its traceback (exit 1)
"""

from enum import IntEnum
from typing import ClassVar


class Exit(IntEnum):
    """Exit codes of the command line; `docs/commands.md` shows the same table."""

    OK = 0
    BUG = 1
    USAGE = 2
    MISMATCH = 3
    REGRESSION = 4
    UNAVAILABLE = 5
    INTEGRITY = 6
    INCONCLUSIVE = 7
    INTERRUPTED = 130
    PIPE = 141


class ReplkError(Exception):
    """Say what is wrong and where, and what to do now."""

    code: ClassVar[Exit] = Exit.USAGE

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem, remedy)
        self.problem, self.remedy = problem, remedy

    def __str__(self) -> str:
        return f"{self.problem} ({self.remedy})"


class CheckpointError(ReplkError):
    """The weights file cannot be taken."""


class MismatchError(ReplkError):
    """An artefact does not compute what its source computes."""

    code = Exit.MISMATCH


class UnavailableError(ReplkError):
    """A package, device or driver is missing or unable."""

    code = Exit.UNAVAILABLE


class IntegrityError(ReplkError):
    """A file is not what its record says, or nothing vouches for it."""

    code = Exit.INTEGRITY


class InconclusiveError(ReplkError):
    """The noise is too large to answer."""

    code = Exit.INCONCLUSIVE


class ContractError(AssertionError):
    """A promise between our own parts is broken."""


def first_line(exc: BaseException) -> str:
    """Return the first words of somebody else's error, or its kind when it has none."""
    return next((line.strip() for line in str(exc).splitlines() if line.strip()), type(exc).__name__)
