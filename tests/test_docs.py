"""What the documentation says is what the program does."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from replk_deploy import cli
from replk_deploy.errors import Exit

ROOT = Path(__file__).parents[1]
COMMANDS = typer.main.get_command(cli.app).commands
PAGES = [p for p in sorted(ROOT.rglob("*.md")) if not any(part.startswith(".") for part in p.relative_to(ROOT).parts)]
FENCE = re.compile(r"^```(\S*)([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def page(name: str) -> str:
    path = ROOT / name
    assert path.is_file(), f"{name} is missing"
    return path.read_text(encoding="utf-8")


def section(text: str, heading: str) -> str:
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    assert found, f"docs/commands.md has no section {heading}"
    return found[1]


def options_of(command: str) -> set[str]:
    found: set[str] = set()
    for parameter in COMMANDS[command].params:
        if parameter.param_type_name == "option":
            found |= {*parameter.opts, *parameter.secondary_opts}
    return found - {"--help", "-h"}


def options_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])(--[a-z][a-z0-9-]*|-[a-z](?![\w-]))", text))


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_a_section_names_every_option_and_no_other(command: str) -> None:
    text = section(page("docs/commands.md"), command)
    table = "\n".join(line for line in text.splitlines() if line.startswith("| `-"))
    stated = options_in("\n".join(line.split("|")[1] for line in table.splitlines()))
    denied = {option for option in options_of(command) if option.startswith("--no-") and option != "--no-verify"}
    assert stated - denied == options_of(command) - denied
    spoken = {word for word in options_in(text) if word.startswith("--")}
    others = set().union(*map(options_of, COMMANDS)) | {"--version", "--help"}
    assert spoken <= others, "an option that no command has"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_command_lines_in_the_documentation_use_options_that_exist(path: Path) -> None:
    for language, _, body in FENCE.findall(path.read_text(encoding="utf-8")):
        if language not in {"sh", "bash", "console", "shell"}:
            continue
        for line in body.replace("\\\n", " ").splitlines():
            for command, rest in re.findall(r"(?:\breplk|cli\.py) (\w+)([^|;&#\n]*)", line):
                assert command in COMMANDS, line
                assert options_in(rest) <= options_of(command) | {"--help", "-h"}, line


def test_the_table_of_exit_codes_is_the_one_in_the_code() -> None:
    text = section(page("docs/commands.md"), "Exit codes")
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", text, re.MULTILINE)
    assert [int(code) for code, _ in rows] == [code.value for code in Exit]
    words = {
        Exit.BUG: "bug",
        Exit.USAGE: "usage",
        Exit.MISMATCH: "mismatch",
        Exit.REGRESSION: "regression",
        Exit.UNAVAILABLE: "unavailable",
        Exit.INTEGRITY: "integrity",
        Exit.INCONCLUSIVE: "inconclusive",
        Exit.INTERRUPTED: "interrupted",
    }
    meanings = {int(code): meaning for code, meaning in rows}
    assert all(word in meanings[code] for code, word in words.items())


def anchors(text: str) -> set[str]:
    text = FENCE.sub("", text)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", h)).strip() for h in headings]
    return {h.lower().replace(" ", "-") for h in plain}


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)", FENCE.sub("", text)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), f"{path.name} links to {target}"
        assert there.is_relative_to(ROOT), target
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there.read_text(encoding="utf-8")), f"{path.name} links to {target}"


BLOCKS = [
    pytest.param(path, body, id=f"{path.relative_to(ROOT)}-{n}")
    for path in PAGES
    if path.is_relative_to(ROOT / "docs") and path.stem not in {"tutorial", "howto"}  # test_pages runs these in order
    for n, (language, info, body) in enumerate(FENCE.findall(path.read_text(encoding="utf-8")), start=1)
    if language == "python" and "no-run" not in info
]


@pytest.mark.parametrize(("path", "body"), BLOCKS)
def test_python_in_the_documentation_runs(path: Path, body: str, tmp_path: Path) -> None:
    ast.parse(body)
    (tmp_path / "models").symlink_to(ROOT / "models")
    done = subprocess.run(
        [sys.executable, "-c", body],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, f"{path.name}: {done.stderr}"


def test_the_readme_begins_with_two_commands() -> None:
    text = page("README.md")
    targets = set(re.findall(r"^([a-z][\w-]*):", page("Makefile"), re.MULTILINE))
    assert {"demo", "test"} <= targets
    assert "make demo" in text
    assert "make test" in text
    assert set(re.findall(r"\bmake ([a-z-]+)\b", "\n".join(b for _, _, b in FENCE.findall(text)))) <= targets


def test_the_changelog_speaks_of_this_version() -> None:
    from replk_deploy import __version__

    assert f"## {__version__}" in page("CHANGELOG.md")
    assert set(re.findall(r"`replk (\w+)`", page("CHANGELOG.md"))) <= set(COMMANDS)


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_page_tells_of_the_machine_it_was_written_on(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for word in (str(ROOT), str(Path.home()), "/tmp/"):  # noqa: S108
        assert word not in text
