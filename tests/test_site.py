"""The site builds without a doubt, holds every page and every option, and the package loads nothing by itself."""

import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

import replk_deploy
from replk_deploy import cli

ROOT = Path(__file__).parents[1]
COMMANDS = typer.main.get_command(cli.app).commands


def built(source: Path, out: Path) -> "subprocess.CompletedProcess[str]":
    line = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-n", "-c", ROOT / "docs", source, out]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=300)


def test_it_builds_with_every_page_and_a_reference_that_is_the_programs_own(tmp_path: Path) -> None:
    site = tmp_path / "site"
    done = built(ROOT / "docs", site)
    assert done.returncode == 0, done.stderr
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} <= {path.stem for path in site.glob("*.html")}
    text = (site / "options.html").read_text(encoding="utf-8")
    for name, command in COMMANDS.items():
        assert f'id="{name}"' in text
        for parameter in command.params:
            assert all(f">{o}</span>" in text for o in parameter.opts if o.startswith("--")), (name, parameter.name)
    assert "Fold BatchNorms and branches" in text
    python = (site / "python.html").read_text(encoding="utf-8")
    for name in ("fuse.fuse", "verify.verify", "export.export", "build.build", "profile.profile", "pipeline.deploy"):
        assert f'id="replk_deploy.{name}"' in python


@pytest.mark.parametrize(
    "page", ["# A\n\n[gone](gone.md)\n", "# A\n\n```{nothing}\n```\n", "# A\n\n[gone](#gone)\n"], ids=str.split
)
def test_a_doubt_stops_the_build(page: str, tmp_path: Path) -> None:
    (tmp_path / "index.md").write_text(page, encoding="utf-8")
    done = built(tmp_path, tmp_path / "out")
    assert done.returncode
    assert "WARNING" in done.stderr


def test_importing_the_package_imports_nothing_else() -> None:
    code = "import sys; before = set(sys.modules); import replk_deploy; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["replk_deploy"]


def test_types_and_version_are_part_of_the_package() -> None:
    assert (Path(replk_deploy.__file__).parent / "py.typed").is_file()
    assert (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split("\n## ")[1].startswith(replk_deploy.__version__)
