"""Draw results of ``engine.py`` and print them as a table: ``plot.py RESULTS.json`` writes RESULTS.png.

The dashed line is the speed of light: the weights' bytes over what the link moves (pinned memory, nothing else).
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

WAYS = {"stock": "stock CRIU + driver calls", "transparent": "ChReK, transparent", "pooled": "ChReK, pooled"}
COLOURS = {"stock": "#9aa5b1", "transparent": "#4f7cac", "pooled": "#2a9d8f"}
Size = dict[str, Any]


def out_seconds(way: Size) -> float:
    """Seconds of moving a pool's weights out before the checkpoint, from the pool's own report; 0 without a pool."""
    return sum(float(seconds) for report in way.get("out") or [] for seconds in re.findall(r"=([\d.]+)s", report))


def capture_seconds(way: Size) -> float:
    """Seconds from a running server to a complete checkpoint."""
    return float(way["capture"]["seconds"]) + out_seconds(way)


def restore_seconds(way: Size) -> float:
    """Seconds to the first output, the best of the runs (of one or two)."""
    return min(float(run["to_output"]) for run in way["restores"])


def floor(size: Size, link: dict[str, float]) -> float:
    """Seconds that the weights need on the link."""
    return float(size["gigabytes"]) / link["to_gpu"]


def bars(axes: Any, sizes: list[Size], value: Any, title: str) -> None:  # noqa: ANN401
    """One group of bars a size."""
    for number, (way, label) in enumerate(WAYS.items()):
        there = [(place, value(size[way])) for place, size in enumerate(sizes) if way in size]
        places = [place + (number - 1) * 0.27 for place, _ in there]
        drawn = axes.bar(places, [seconds for _, seconds in there], width=0.26, label=label, color=COLOURS[way])
        axes.bar_label(drawn, fmt="%.1f", fontsize=7)
    axes.set_xticks(range(len(sizes)), [f"{size['gigabytes']:g} GB" for size in sizes])
    axes.set_yscale("log")
    axes.set_ylabel("seconds")
    axes.set_title(title, fontsize=10)
    axes.grid(axis="y", alpha=0.3)


def draw(results: dict[str, Any], target: Path) -> None:
    """Write the picture."""
    sizes = results["sizes"]
    figure, (restore, capture) = plt.subplots(1, 2, figsize=(12, 4.6))
    bars(restore, sizes, restore_seconds, "restore: start of the program to the first output")
    for place, size in enumerate(sizes):
        limit = floor(size, results["link"])
        label = "speed of light (the link)" if not place else None
        restore.plot([place - 0.42, place + 0.42], [limit, limit], "k--", linewidth=1, label=label)
    bars(capture, sizes, capture_seconds, "checkpoint: running server to a complete checkpoint")
    restore.legend(fontsize=8, loc="upper left")
    restore.set_ylim(top=120)
    machine = results["machine"]
    figure.suptitle(
        f"{machine['gpu']}; {machine['cores']} cores, {machine['memory_gb']} GB; Linux {machine['kernel']}; "
        f"CRIU {machine['criu']}; memory file system; {machine['date']}",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(target, dpi=110)


def table(results: dict[str, Any]) -> None:
    """Print the results as Markdown."""
    print("| weights | way | cold start | checkpoint | restore to output | of the link | parts of the restore |")
    print("|---|---|---|---|---|---|---|")
    for size in results["sizes"]:
        for way, label in WAYS.items():
            if way not in size:
                continue
            found = size[way]
            best = min(found["restores"], key=lambda run: run["to_output"])
            parts = {name: seconds for name, seconds in best["phases"].items() if seconds >= 0.05}
            told = ", ".join(f"{name} {seconds:.2f}" for name, seconds in parts.items())
            if best.get("back"):
                told += f"; pool: {best['back'][0].split(', ')[-1]}"
            share = 100 * floor(size, results["link"]) / restore_seconds(found)
            times = f"{found['cold']:.1f} s | {capture_seconds(found):.1f} s | {restore_seconds(found):.2f} s"
            print(f"| {size['gigabytes']:g} GB | {label} | {times} | {share:.0f} % | {told} |")


def main() -> None:
    """Draw and print each file that is named."""
    for name in sys.argv[1:]:
        path = Path(name)
        results = json.loads(path.read_text())
        draw(results, path.with_suffix(".png"))
        table(results)


if __name__ == "__main__":
    main()
