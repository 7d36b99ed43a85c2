"""What a record says of its machine, and what it must not say."""

import getpass
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from replk_deploy import machine


def test_it_says_what_latencies_depend_on_in_types_of_json() -> None:
    facts = machine.environment()
    assert json.loads(json.dumps(facts)) == facts
    assert isinstance(facts["threads_usable"], int) and facts["threads_usable"] >= 1  # noqa: PT018  # one fact
    assert facts["python"] == platform.python_version()
    assert facts["memory_mib"] > 0
    assert {
        "cpu",
        "cores_physical",
        "governor",
        "container",
        "load_1min",
        "torch",
        "onnxruntime",
        "git",
    } <= facts.keys()


def test_it_names_no_host_no_user_and_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MKL_CACHE", "/home/somebody/mkl")
    text = json.dumps(machine.environment())
    assert "(a path)" in text
    assert "somebody" not in text
    assert str(Path.home()) not in text
    for secret in {platform.node(), getpass.getuser()} - {"", "root", "localhost"}:
        assert not re.search(rf"\b{re.escape(secret)}\b", text)  # a host called vm is no part of nvml


def test_variables_that_change_speed_are_kept_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("KMP_BLOCKTIME", "1")
    monkeypatch.setenv("REPLK_PRIVATE", "x")
    facts = machine.environment()
    assert (facts["env.OMP_NUM_THREADS"], facts["env.KMP_BLOCKTIME"]) == ("3", "1")
    assert "env.REPLK_PRIVATE" not in facts


def test_a_missing_distribution_has_no_version() -> None:
    assert machine.version("no-such-distribution-of-anyone") is None
    assert machine.version("numpy")


def test_neither_it_nor_the_registry_loads_a_runtime() -> None:
    code = (
        "import sys; from replk_deploy import machine, backends; machine.environment();"
        "print([m for m in ('torch', 'onnx', 'onnxruntime') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == "[]"
