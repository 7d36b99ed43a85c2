"""Sections → HTML, Markdown and JSON text; no file, no clock."""

import json
import re
from collections.abc import Iterator
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError

from replk_deploy import records
from replk_deploy.report.facts import DAMAGE, Report, damaged
from replk_deploy.report.sections import (
    WORDS,
    Chart,
    Code,
    Doubt,
    Part,
    Section,
    Table,
    Words,
    sections,
    sentence_of,
    title_of,
)

NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]?\d+)?( ?[%xGM]?| \[.*\])?$|–$|n/a.*$|nan$|inf$|$")
HASH = re.compile(r"[0-9a-f]{40,64}(-dirty)?$")
STATES = {word: state for state, word in WORDS.items()}
BULKY = ("samples_ms", "blocks", "windows", "gpu_ms", "enqueue_ms", "flags", "warmup", "pace")


def every(report: Report) -> dict[str, str]:
    """Return all forms by their endings.

    Raises:
        IntegrityError: one of them cannot take a record: it is damaged, whichever form was asked for.
    """
    try:
        return {"json": as_json(report), "md": markdown(report), "html": html(report)}
    except (*DAMAGE, UndefinedError) as exc:
        raise damaged(", ".join(run.name for run in report.runs), exc) from exc


def html(report: Report) -> str:
    """Write one self-contained page."""
    environment = Environment(
        loader=PackageLoader("replk_deploy.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "kind": lambda part: type(part).__name__,
        "numeric": numeric,
        "words": WORDS,
        "states": STATES,
    }
    environment.tests["hash"] = lambda text: bool(HASH.match(text))
    found = sections(report)
    return (
        environment.get_template("page.html.jinja").render(
            title=title_of(report), report=report, sections=found, sentence=sentence_of, anchor=_anchor
        )
        + "\n"
    )


def markdown(report: Report) -> str:
    """Write what reads well in a pull request: verdict and tables; pictures are in the page alone."""
    parts = [f"# {title_of(report)}: {report.state}"]
    parts += [f"**{WORDS[run.state]}** {run.name} · {_escaped(sentence_of(run))}" for run in report.runs]
    for section in sections(report):
        written = list(_written(section))
        parts += [f"## {_escaped(section.title)}", *written] if written else []
    return "\n\n".join(parts) + "\n"


def as_json(report: Report) -> str:
    """Write the record; samples stay in the record of the measurement."""
    plain = records.plain(report)
    for run in plain["runs"]:
        for row in (run["bench"] or {"rows": ()})["rows"]:
            for name in BULKY:
                row.pop(name, None)
    return json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def numeric(table: Table) -> tuple[bool, ...]:
    """Tell which columns hold numbers only."""
    return tuple(bool(any(cells)) and all(map(NUMBER.match, cells)) for cells in zip(*table.rows, strict=True))


def _written(section: Section) -> Iterator[str]:
    for part in section.parts:
        text = _part(part)
        if text:
            yield text


def _part(part: Part) -> str:
    match part:
        case Table():
            rule = "|".join(" ---: " if number else " --- " for number in numeric(part))
            rows = ["| " + " | ".join(map(_cell, row)) + " |" for row in part.rows]
            return "\n".join(["| " + " | ".join(map(_escaped, part.head)) + " |", f"|{rule}|", *rows])
        case Words(text):
            return _escaped(text)
        case Doubt(text):
            return f"> {_escaped(text)}"
        case Code(lines):
            return "\n".join(("```sh", *lines, "```"))
        case Chart():
            return ""


def _cell(text: str) -> str:
    if HASH.match(text):
        return f"`{text}`"
    return f"**{text}**" if text in WORDS.values() else _escaped(text)


def _escaped(text: str) -> str:
    """Keep a text what it is in Markdown, on one line."""
    return re.sub(r"([|<>`*_\\\[\]])", r"\\\1", " ".join(text.split()))


def _anchor(text: Any) -> str:
    return re.sub(r"\W+", "-", str(text).lower()).strip("-")
