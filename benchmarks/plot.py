"""The results of ``core.py`` as a picture; ``plot.py RESULTS.json`` writes RESULTS.png. It needs matplotlib."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from core_bench.report import middle

INK, QUIET = "#222222", "#888888"
STOCK, LAZY, PLAIN, OFF = "#9a9a9a", "#1f5f99", "#7fb0d8", "#54a06b"
PANELS = (
    ("Capture", "captures", "seconds", (("stock", "stock", STOCK), ("lazy", "ChReK lazy", LAZY), ("plain", "ChReK plain", PLAIN))),
    ("Frozen", "captures", "outside", (("stock", "stock", STOCK), ("lazy", "ChReK lazy", LAZY), ("plain", "ChReK plain", PLAIN))),
    (
        "Restore to the first sign of life",
        "restores",
        "seconds",
        (("stock", "stock, no check", STOCK), ("lazy full", "ChReK, verify=full", LAZY), ("lazy off", "ChReK, verify=off", OFF)),
    ),
)


def draw(results: dict[str, Any], target: Path) -> None:
    """Write the picture."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    sizes = results["sizes"]
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.6), constrained_layout=True)
    for axis, (title, kind, key, bars) in zip(axes, PANELS, strict=True):
        for place, (name, label, colour) in enumerate(bars):
            values = [_value(size[kind][name], key) for size in sizes]
            at = [number + (place - 1) * 0.27 for number in range(len(sizes))]
            drawn = axis.bar(at, values, 0.25, color=colour, label=label)
            axis.bar_label(drawn, fmt=lambda value: f"{value:.2g}", fontsize=7, color=INK, padding=1)
        axis.set_title(title, loc="left", color=INK)
        axis.set_yscale("log")
        axis.set_ylabel("seconds (log scale)", color=QUIET)
        axis.set_xticks(range(len(sizes)), [size["size"]["name"].replace(" half", "\nhalf") for size in sizes], fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8, loc="upper left")
        axis.margins(y=0.25)
    machine = results["machine"]
    figure.supxlabel(
        f"{machine['processor']}, {machine['cores']} cores, Linux {machine['kernel']}, CRIU {machine['criu']},"
        f" checkpoints on {machine['store']}, {machine['date']}; medians of {results['rounds']} interleaved runs;"
        " commands as a whole, Python's start included",
        fontsize=8,
        color=QUIET,
    )
    figure.savefig(target, dpi=130)


def _value(samples: list[dict[str, Any]], key: str) -> float:
    return middle(samples, "frozen" if key == "outside" and "outside" not in samples[0] else key)


if __name__ == "__main__":
    for source in map(Path, sys.argv[1:]):
        draw(json.loads(source.read_text()), source.with_suffix(".png"))
        print(f"plot.py: written to {source.with_suffix('.png')}")
