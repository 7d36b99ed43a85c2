"""Imports go down the layers, each runtime has one home, and each command has its module, docs and tests."""

import ast
import functools
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

import replk_deploy
from replk_deploy import cli, doctor, pipeline, selftest

PACKAGE = Path(replk_deploy.__file__).parent
ROOT = PACKAGE.parent
LAYERS: list[set[str]] = [
    {"errors"},
    {"precision", "progress", "records", "files", "optional", "batch", "forms", "config", "advice"},
    {"models", "preprocess", "onednn", "tf32", "quantiles", "clocks", "machine", "metadata", "charts"},
    {"weights", "graph", "container", "measurement"},
    {"lowerings", "kernels"},
    {"backends"},
    {
        "checkpoint",
        "fuse",
        "poison",
        "verify",
        "bisect",
        "export",
        "lower",
        "inspect",
        "images",
        "evaluate",
        "build",
        "lanes",
        "bench",
        "costs",
        "calibrate",
        "compare",
        "roofline",
        "sites",
        "profile",
        "erf",
        "doctor",
    },
    {"proof"},
    {"selftest", "workspace", "report", "publish", "sources", "ci"},
    {"pipeline"},
    {"render", "options", "testing"},
    {"cli"},
]
WITHIN = {  # who may import whom in its own layer, and why
    ("files", "errors"): "errors lie below",
    ("metadata", "preprocess"): "a file says what its pictures went through",
    ("metadata", "models"): "a file says which form of a network it holds",
    ("machine", "clocks"): "a GPU is part of the machine",
    ("bench", "lanes"): "contestants are what it races",
    ("compare", "bench"): "the record that it reads",
    ("lower", "export"): "what one file can hold",
    ("calibrate", "costs"): "times are what it finds",
    ("calibrate", "lower"): "a form is timed as a file holds it",
    ("profile", "sites"): "what each layer computes",
    ("profile", "roofline"): "what the device could do",
    ("models", "preprocess"): "a network to compare with says what its pictures go through",
    ("evaluate", "images"): "pictures are what it counts over",
    ("evaluate", "verify"): "the type of an answer",
    ("inspect", "checkpoint"): "an open checkpoint is what it looks at",
    ("inspect", "fuse"): "names the BatchNorms as the fusion does",
    ("advice", "records"): "the manifest of a run",
    ("publish", "workspace"): "places a file in a run",
    ("sources", "workspace"): "finds a file in a run",
    ("report", "workspace"): "a run is what it reads",
}
ONLY = {  # package → the modules that may import it
    "typer": {"cli", "options"},
    "rich": {"render"},
    "onnxruntime": {"backends/ort"},
    "openvino": {"backends/openvino"},
    "triton": {"backends/compiler", "kernels/matrix", "kernels/products"},
    "cuda": {"kernels/nvrtc"},
    "tensorrt": {"backends/trt"},
    "tensorrt_rtx": {"backends/trt"},
    "timm": {"models/baselines"},
    "PIL": {"images", "preprocess"},
    "scipy": {"costs", "quantiles"},
    "matplotlib": {"charts"},
    "jinja2": {"report/forms"},
    "psutil": {"machine"},
    "pynvml": {"clocks"},
    "filelock": {"workspace"},
    "safetensors": {"container", "weights"},
    "subprocess": {"machine", "backends/compiler"},
}


@functools.cache
def modules() -> tuple[tuple[str, ast.Module], ...]:
    paths = sorted(PACKAGE.rglob("*.py"))
    names = (path.relative_to(PACKAGE).with_suffix("").as_posix() for path in paths)
    return tuple(zip(names, (ast.parse(path.read_text(encoding="utf-8")) for path in paths), strict=True))


def imports(tree: ast.Module) -> Iterator[str]:
    """Name everything a module imports, inside functions and through import_module() and load() too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide where a thing comes from"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"load", "import_module", "find_spec"} and isinstance(node.args[0].value, str):
                yield node.args[0].value


def edges(name: str, tree: ast.Module) -> Iterator[str]:
    """Name the parts of ours that a module imports."""
    known = set().union(*LAYERS)
    for found in imports(tree):
        top, *rest = found.split(".")
        if top == "replk_deploy" and rest and rest[0] in known and rest[0] != name.partition("/")[0]:
            yield rest[0]


def rank(part: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if part in layer)


def violations(name: str, tree: ast.Module) -> list[str]:
    here = name.partition("/")[0]
    if here == "__init__":
        return [f"the package imports {found}" for found in imports(tree)]
    found = []
    for part in edges(name, tree):
        up = rank(part) > rank(here)
        beside = rank(part) == rank(here) and (here, part) not in WITHIN
        if up or beside:
            found.append(f"{name} imports {part}")
    for owned, allowed in ONLY.items():
        found += [
            f"{name} imports {i}" for i in imports(tree) if f"{i}.".startswith(f"{owned}.") and name not in allowed
        ]
    return found


def test_every_module_has_its_layer_and_every_layer_its_modules() -> None:
    here = {name.partition("/")[0] for name, _ in modules()} - {"__init__"}
    assert here == set().union(*LAYERS)
    assert sum(map(len, LAYERS)) == len(here)


@pytest.mark.parametrize("name", [name for name, _ in modules()])
def test_imports_go_down(name: str) -> None:
    assert violations(name, dict(modules())[name]) == []


def test_no_exception_is_kept_that_nobody_needs() -> None:
    found = {
        (name.partition("/")[0], part) for name, tree in modules() for part in edges(name, tree) if name != "__init__"
    }
    assert set(WITHIN) <= found
    homes = {
        owned: {n for n, tree in modules() for i in imports(tree) if f"{i}.".startswith(f"{owned}.")} for owned in ONLY
    }
    assert homes == ONLY


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("verify", "from replk_deploy import pipeline"),
        ("verify", "def f():\n    from replk_deploy.export import export"),
        ("fuse", "import onnxruntime"),
        ("fuse", "from replk_deploy import optional\noptional.load('onnxruntime', package='', install='')"),
        ("pipeline", "import typer"),
        ("models/reparam", "from replk_deploy.fuse import fuse"),
        ("proof", "from replk_deploy.workspace import Workspace"),
        ("render", "import replk_deploy.cli"),
        ("__init__", "import torch"),
    ],
)
def test_the_rule_sees_what_it_forbids(name: str, code: str) -> None:
    assert violations(name, ast.parse(code))


def names_used(tree: ast.Module) -> set[str]:
    return {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)} | {
        n.id for n in ast.walk(tree) if isinstance(n, ast.Name)
    }


def test_nobody_leaves_the_process_or_prints_on_his_own() -> None:
    for name, tree in modules():
        used = names_used(tree) | set(imports(tree))
        assert not used & {"sys.exit", "os._exit", "os.abort", "exit", "quit", "SystemExit"}, name
        if name != "render":
            assert not used & {"print", "sys.stdout", "sys.stderr"}, name


def test_networks_know_nothing_of_their_surroundings() -> None:
    for name, tree in modules():
        if name.startswith("models/"):
            tops = {i.split(".")[0] for i in imports(tree)}
            assert not tops & {"os", "sys", "pathlib", "logging", "warnings", "subprocess"}, name


def test_the_environment_is_read_in_one_place() -> None:
    readers = {
        name for name, tree in modules() if any(u.startswith(("os.environ", "os.getenv")) for u in names_used(tree))
    }
    assert readers == {"machine"}


COMMANDS = sorted(c.name or c.callback.__name__ for c in cli.app.registered_commands)


def test_the_commands_are_those_that_are_promised() -> None:
    assert [
        *(
            "bench",
            "build",
            "compare",
            "demo",
            "deploy",
            "doctor",
            "erf",
            "export",
            "fuse",
            "inspect",
            "lower",
            "profile",
            "report",
            "selftest",
            "verify",
        ),
    ] == COMMANDS
    assert set(COMMANDS) == set(typer.main.get_command(cli.app).commands)


TESTED_IN = {"inspect": "inspect", "deploy": "pipeline", "selftest": "sabotage"}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_its_function_its_page_and_its_tests(command: str) -> None:
    home = {"selftest": selftest, "doctor": doctor}.get(command, pipeline)
    function = getattr(home, command)
    assert inspect.isfunction(function)
    assert function.__module__.startswith(home.__name__)
    assert function.__doc__
    modules = (f"{command}.py", f"{command}/__init__.py")
    assert command in {"demo", "deploy"} or any((PACKAGE / p).is_file() for p in modules)
    assert f"\n## {command}\n" in (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    tests = ROOT / "tests" / f"test_{TESTED_IN.get(command, command)}.py"
    assert tests.is_file(), f"{tests.name} is missing"
    assert "\ndef test_" in tests.read_text(encoding="utf-8")


def test_every_result_that_is_written_has_a_kind_of_its_own() -> None:
    kinds: dict[str, str] = {}
    for name, tree in modules():
        for cls in (n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)):
            for item in cls.body:
                if isinstance(item, ast.AnnAssign) and ast.unparse(item.target) == "KIND" and item.value:
                    kind = ast.literal_eval(item.value)
                    assert kind not in kinds, f"{kind} is written by {kinds.get(kind)} and {name}.{cls.name}"
                    kinds[kind] = f"{name}.{cls.name}"
                    assert any(isinstance(i, ast.AnnAssign) and ast.unparse(i.target) == "FORMAT" for i in cls.body)
                    decorators = " ".join(map(ast.unparse, cls.decorator_list))
                    assert "frozen=True" in decorators
                    assert "kw_only=True" in decorators
    assert {"fused", "exported", "proof", "bench", "deployment", "inspection", "manifest", "selftest"} <= kinds.keys()
