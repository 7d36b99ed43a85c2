"""Draw docs/figures/throughput.svg: images a second of RepLKNet-31B and of networks of its accuracy class.

    python docs/figures/throughput.py

Reads docs/benchmarks/latency-nvidia-h100-80gb-hbm3.json: throughput with a full queue. Batch 128 is a run of its own.
"""

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt  # after the backend is chosen

HERE = Path(__file__).parent
RECORD = HERE.parent / "benchmarks" / "latency-nvidia-h100-80gb-hbm3.json"
RUNS = {1: "b1,8,64,128", 8: "b1,8,64,128", 64: "b1,8,64,128", 128: "b128"}
WHO = {
    ("", "native"): "RepLKNet-31B, native",
    ("convnext_base", "torch-compile"): "ConvNeXt-B, compiled",
    ("swin_base_patch4_window7_224", "torch-compile"): "Swin-B, compiled",
    ("", "torch-compile"): "RepLKNet-31B, lowered, compiled",
}
PAPER, INK, FAINT, OURS, THEIRS = "#f6f8fa", "#1f2328", "#6e7781", "#0969da", "#afb8c1"


def rows(batch: int) -> dict[str, dict[str, Any]]:
    """Return the rows of a batch by whom they are of."""
    entries = json.loads(RECORD.read_text(encoding="utf-8"))["entries"]
    found = entries[f"RepLKNet-31B 224 fp16 torch-compile native {RUNS[batch]} on"]["bench"]["rows"]
    return {WHO[r["model"], r["backend"]]: r for r in found if r["batch"] == batch}


def main() -> None:
    """Write the figure beside this file."""
    mpl.rcParams.update({"svg.hashsalt": "replk", "font.family": "DejaVu Sans", "font.size": 9, "text.color": INK})
    figure, panels = plt.subplots(1, len(RUNS), figsize=(9.4, 2.5), sharey=True, facecolor=PAPER)
    for panel, batch in zip(panels, RUNS, strict=True):
        found = rows(batch)
        speeds = [found[name]["throughput"]["images_per_s"] for name in WHO.values()]
        panel.barh(list(WHO.values()), speeds, color=[OURS, THEIRS, THEIRS, THEIRS], height=0.66)
        for place, speed in enumerate(speeds):
            inside = speed > max(speeds) / 2
            panel.text(
                speed - max(speeds) / 40 if inside else speed + max(speeds) / 40,
                place,
                f"{speed:,.0f}",
                va="center",
                ha="right" if inside else "left",
                color="white" if inside and not place else INK,
            )
        panel.set_title(f"batch {batch}", color=INK, fontsize=9)
        panel.set_facecolor(PAPER)
        panel.set_xlim(0, max(speeds) * 1.02)
        panel.set_xticks([])
        panel.tick_params(length=0, labelcolor=INK)
        panel.spines[:].set_visible(False)
    panels[0].invert_yaxis()
    figure.suptitle("Images a second, 224x224, float16, one H100, CUDA graphs", fontsize=10, color=INK)
    figure.tight_layout(rect=(0, 0, 1, 1))
    figure.savefig(HERE / "throughput.svg", facecolor=PAPER, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
