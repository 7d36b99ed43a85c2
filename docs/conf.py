"""Sphinx reads the pages as they are in the repository; what only the program knows is written while they are read."""

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import typer.main

from replk_deploy import __version__, cli

project = "replk"
copyright = "the replk authors"  # noqa: A001  # Sphinx's own name
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"replk {__version__}"
exclude_patterns = ["_build", "examples/*.md"]
myst_heading_anchors = 3
myst_fence_as_directive = ["math"]
default_role = "literal"  # a docstring's single backticks are code
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
nitpick_ignore_regex = [("py:.*", ".*")]  # types of torch and numpy, and ours that have no page

OUTSIDE = re.compile(r"\[([^]\n]*)\]\(\.\./[^)\n]*\)")


def commands() -> str:
    """Return a section per command: its promise, and a table of what it takes with the program's own words."""
    parts = []
    for name, command in sorted(typer.main.get_command(cli.app).commands.items()):
        rows = []
        for parameter in command.params:
            words = (
                ", ".join(f"`{o}`" for o in (*parameter.opts, *parameter.secondary_opts))
                if parameter.param_type_name == "option"
                else f"`{parameter.name.upper()}`"
            )
            said = (getattr(parameter, "help", None) or "").replace("|", "\\|")
            rows.append(f"| {words} | {'required' if parameter.required else ''} | {said} |")
        parts += [f"## {name}", command.help or "", "", "| | | |", "| --- | --- | --- |", *rows, ""]
    return "\n".join(parts)


def read(_app: Any, page: str, source: list[str]) -> None:
    """Fill the reference; a link to a file that the site does not hold becomes its words."""
    if page == "options":
        source[0] += commands()
    source[0] = OUTSIDE.sub(r"\1", source[0])


def setup(app: Any) -> None:
    """Join the build."""
    app.connect("source-read", read)
