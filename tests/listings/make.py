"""Write what the Python bindings of a TensorRT offer, from its wheel, on a machine without GPU or TensorRT.

    pip download --no-deps tensorrt-cu13-bindings==11.4.0.106
    python tests/listings/make.py tensorrt_cu13_bindings-11.4.0.106-*.whl

The bindings are a compiled module that wants NVIDIA's libraries. Empty ones are compiled for it, which export
the few functions it asks for; nothing can be built with them, but the module loads and can be looked at.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).parent
LIBRARY = re.compile(
    rb"lib(?:nvinfer|nvonnxparser|nvinfer_plugin|tensorrt_rtx|tensorrt_onnxparser_rtx)[.\w]*\.so[.\d]+"
)
CLASSES = [  # that an adapter may touch; one that a version lacks is not in its listing
    *("Builder", "INetworkDefinition", "ITensor", "IBuilderConfig", "IOptimizationProfile", "ITimingCache"),
    *("OnnxParser", "ParserError", "ErrorCode", "Runtime", "ICudaEngine", "IExecutionContext", "IRuntimeConfig"),
    *("EngineInspector", "IProfiler", "IProgressMonitor", "ILogger", "Severity", "Refitter", "OnnxParserRefitter"),
    *("IHostMemory", "BuilderFlag", "NetworkDefinitionCreationFlag", "ProfilingVerbosity", "MemoryPoolType"),
    *("HardwareCompatibilityLevel", "ExecutionContextAllocationStrategy", "LayerInformationFormat", "DataType"),
    *(
        "ComputeCapability",
        "EngineValidity",
        "EngineInvalidityDiagnostics",
        "DynamicShapesKernelSpecializationStrategy",
    ),
]
LOOK = """
import importlib, json, sys
module = importlib.import_module(sys.argv[1])
classes = {}
for name in sys.argv[2:]:
    cls = module.ILogger.Severity if name == "Severity" else getattr(module, name, None)
    if cls is None:
        continue
    classes[name] = {m: getattr(cls, m).__doc__ or "" for m in dir(cls) if not m.startswith("_")}
    if not hasattr(cls, "__members__"):
        classes[name]["__init__"] = cls.__init__.__doc__ or ""
print(json.dumps({"version": module.__version__, "classes": classes}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the listing of each wheel of bindings.")
    parser.add_argument("wheels", nargs="+", type=Path)
    for wheel in parser.parse_args().wheels:
        with tempfile.TemporaryDirectory() as folder:
            found = look(wheel, Path(folder))
        package = "tensorrt_rtx" if "rtx" in wheel.name else "tensorrt"
        found["classes"] = {
            cls: {name: parameters(name, words) for name, words in sorted(members.items())}
            for cls, members in sorted(found["classes"].items())
        }
        release = ".".join(found["version"].split(".")[:2])
        path = HERE / f"{package}-{release}.json"
        path.write_text(dumped({"package": package, **found}), encoding="utf-8")
        print(path)


def look(wheel: Path, folder: Path) -> dict:
    """Unpack a wheel, give its module empty libraries, import it elsewhere and return what it holds."""
    zipfile.ZipFile(wheel).extractall(folder)
    (module,) = folder.glob("tensorrt*_bindings/tensorrt*.so")
    symbols = subprocess.run(["nm", "-D", "--undefined-only", module], capture_output=True, text=True, check=True)
    wanted = {
        symbol
        for kind, symbol in (line.split()[-2:] for line in symbols.stdout.splitlines())
        if kind == "U" and "@" not in symbol and not symbol.startswith(("Py", "_Py"))
    }
    source = folder / "empty.c"
    source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in sorted(wanted)))
    for library in {name.decode() for name in LIBRARY.findall(module.read_bytes())}:
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", folder / library, source]
        subprocess.run(command, check=True)
    seen = subprocess.run(
        [sys.executable, "-c", LOOK, module.parent.name, *CLASSES],
        env={**os.environ, "PYTHONPATH": str(folder), "LD_LIBRARY_PATH": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(seen.stdout)


def parameters(name: str, words: str) -> list[str] | None:
    """Return the parameters of each overload, as the first lines of its documentation name them; None of a property."""
    found = []
    for line in words.splitlines():
        signature = re.match(rf"\s*(?:\d+\. )?{re.escape(name)}\((.*)\) -> ", line)
        if signature and signature[1] != "*args, **kwargs":
            flat = signature[1]
            while (inner := re.sub(r"\[[^\[\]]*\]|<[^<>]*>|\([^()]*\)", "", flat)) != flat:
                flat = inner
            names = (f"{p.split(':')[0].strip()}{'=' if '=' in p else ''}" for p in flat.split(","))
            found.append(", ".join(name for name in names if name not in {"", "self"}))
    return found or None


def dumped(listing: dict) -> str:
    """Return JSON with one line a class."""
    classes = ",\n  ".join(f"{json.dumps(cls)}: {json.dumps(members)}" for cls, members in listing["classes"].items())
    rest = {key: value for key, value in listing.items() if key != "classes"}
    return f'{json.dumps(rest)[:-1]}, "classes": {{\n  {classes}\n}}}}\n'


if __name__ == "__main__":
    main()
