"""Draw the results of ``core.py``: capture, frozen and restore time beside stock CRIU's, as a PNG.

``python benchmarks/plot.py RESULTS.json`` writes RESULTS.png. It needs matplotlib, which `make bench` installs.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

CAPTURES = {"stock": "stock CRIU", "lazy": "ChReK, lazy dump", "plain": "ChReK, plain dump"}
RESTORES = {
    "stock": "stock CRIU, verifies nothing",
    "lazy full": "ChReK lazy, verify=full",
    "lazy off": "ChReK lazy, verify=off",
    "plain full": "ChReK plain, verify=full",
    "plain off": "ChReK plain, verify=off",
}
COLOURS = ("#9aa5b1", "#4f7cac", "#7fb069", "#264653", "#2a9d8f")


def middle(samples: list[dict[str, Any]], *keys: str) -> float:
    """Return the median of the first of `keys` that a sample has."""
    return statistics.median(next(float(sample[key]) for key in keys if key in sample) for sample in samples)


def bars(axes: Any, names: list[str], rows: dict[str, list[float]], title: str) -> None:  # noqa: ANN401
    """Draw one group of bars a size, one bar a contender."""
    width = 0.8 / len(rows)
    for number, (label, values) in enumerate(rows.items()):
        places = [place + number * width for place in range(len(names))]
        axes.bar(places, values, width=width, label=label, color=COLOURS[number])
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(names))], names, fontsize=8)
    axes.set_ylabel("seconds")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=7)
    axes.grid(axis="y", alpha=0.3)


def draw(results: dict[str, Any], target: Path) -> None:
    """Write the picture."""
    sizes = results["sizes"]
    names = [size["size"]["name"] for size in sizes]
    figure, (capture, frozen, restore) = plt.subplots(1, 3, figsize=(15, 4.4))
    bars(
        capture,
        names,
        {label: [middle(size["captures"][kind], "seconds") for size in sizes] for kind, label in CAPTURES.items()},
        "capture, whole command (ChReK's is digested and on disk)",
    )
    bars(
        frozen,
        names,
        {
            label: [middle(size["captures"][kind], "outside", "frozen") for size in sizes]
            for kind, label in CAPTURES.items()
        },
        "application frozen",
    )
    bars(
        restore,
        names,
        {label: [middle(size["restores"][kind], "seconds") for size in sizes] for kind, label in RESTORES.items()},
        "restore, to the first heartbeat",
    )
    machine = results["machine"]
    figure.suptitle(
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gb']} GB; Linux {machine['kernel']}; "
        f"CRIU {machine['criu']}; {machine['store']}; {machine['date']}; medians of {results['rounds']} interleaved runs",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(target, dpi=110)


def main() -> int:
    """Draw each file that is named."""
    for name in sys.argv[1:]:
        path = Path(name)
        draw(json.loads(path.read_text()), path.with_suffix(".png"))
        print(f"plot.py: written to {path.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
