"""Packages that a user may not have."""

from importlib import import_module
from types import ModuleType

from replk_deploy.errors import UnavailableError


def load(module: str, *, package: str, install: str) -> ModuleType:
    """Import a module of an optional package.

    Raises:
        UnavailableError: the package is not installed; the remedy is the install line.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as exc:
        if exc.name is None or not f"{module}.".startswith(f"{exc.name}."):
            raise  # a broken installation: the original words help more
        raise UnavailableError(f"{package} is not installed", f"pip install '{install}'") from exc
