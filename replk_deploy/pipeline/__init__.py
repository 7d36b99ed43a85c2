"""One function per command; the only place where the steps meet. Start reading here.

    checkpoint ─fuse▶ fused.safetensors ─export▶ model.<precision>.onnx ─lower▶ .onnx ─build▶ engine ─bench▶ latencies
         └─────────────────── proof: every file against the float64 network ───────────────────┘

A file gets its final name only after its proof. One that fails is kept apart, under `rejected`.
"""

from replk_deploy.pipeline.benching import Benched, bench
from replk_deploy.pipeline.building import Built, build
from replk_deploy.pipeline.comparing import compare
from replk_deploy.pipeline.demonstrating import demo
from replk_deploy.pipeline.deploying import Deployment, deploy
from replk_deploy.pipeline.exporting import Exported, export
from replk_deploy.pipeline.fusing import Fused, fuse
from replk_deploy.pipeline.inspecting import inspect
from replk_deploy.pipeline.lowering import LoweredFile, calibrate, export_lowered, lower
from replk_deploy.pipeline.profiling import profile
from replk_deploy.pipeline.receptive import erf
from replk_deploy.pipeline.reporting import report
from replk_deploy.pipeline.verifying import verify

__all__ = [
    "Benched",
    "Built",
    "Deployment",
    "Exported",
    "Fused",
    "LoweredFile",
    "bench",
    "build",
    "calibrate",
    "compare",
    "demo",
    "deploy",
    "erf",
    "export",
    "export_lowered",
    "fuse",
    "inspect",
    "lower",
    "profile",
    "report",
    "verify",
]
