"""Results as JSON and as a table for people; medians, and ratios of medians."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any


def write(results: dict[str, Any], target: Path) -> None:
    """Write *target* and the table beside it."""
    target.write_text(json.dumps(results, indent=1) + "\n")
    target.with_suffix(".md").write_text(table(results))


def middle(samples: Iterable[dict[str, Any]], key: str) -> float:
    """Return the median of one figure."""
    return median(float(sample[key]) for sample in samples)


def table(results: dict[str, Any]) -> str:
    """Return both tables."""
    machine = results["machine"]
    lines = [
        (
            f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gb']} GB; Linux {machine['kernel']};"
            f" CRIU {machine['criu']}; Python {machine['python']}; checkpoints on {machine['store']}; {machine['date']}."
        ),
        f"Medians of {results['rounds']} interleaved runs, in seconds; in brackets the part of stock's.",
        "",
        (
            "Capture: the whole command. Frozen: how long the process's own heartbeat stood still. ChReK digests"
            " everything and flushes it to the disk; stock does neither, its flush alone is in the column beside."
        ),
        "",
        "| memory | stock | + flush | frozen | ChReK lazy | frozen | ChReK plain | frozen | user memory | pipes |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_capture_line(size) for size in results["sizes"]]
    lines += [
        "",
        "Restore: from the start of the command to the process's first heartbeat.",
        "",
        "| memory | stock, verifies nothing | ChReK, verify=full | ChReK, verify=off |",
        "|---|---|---|---|",
    ]
    for size in results["sizes"]:
        stock = middle(size["restores"]["stock"], "seconds")
        kinds = ("lazy full", "lazy off")
        cells = [f"{stock:.3f}", *(_beside(middle(size["restores"][kind], "seconds"), stock) for kind in kinds)]
        lines.append(f"| {size['size']['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _capture_line(size: dict[str, Any]) -> str:
    captures = size["captures"]
    stock, frozen = middle(captures["stock"], "seconds"), middle(captures["stock"], "frozen")
    cells = [f"{stock:.3f}", f"{stock + middle(captures['stock'], 'flush'):.3f}", f"{frozen:.3f}"]
    for mode in ("lazy", "plain"):
        cells.append(_beside(middle(captures[mode], "seconds"), stock))
        cells.append(_beside(middle(captures[mode], "outside"), frozen))
    used = max(sample["rss"] for mode in ("lazy", "plain") for sample in captures[mode])
    used = max([used, *(sample["rss"] for samples in size["restores"].values() for sample in samples if "rss" in sample)])
    cells += [f"{used / 1e6:.0f} MB", f"{size['pipe_memory'] / 1e6:.1f} MB"]
    return f"| {size['size']['name']} | " + " | ".join(cells) + " |"


def _beside(value: float, stock: float) -> str:
    return f"{value:.3f} ({value / stock:.2f})"
