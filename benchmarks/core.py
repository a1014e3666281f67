#!/usr/bin/env python3
"""ChReK beside stock CRIU: capture, frozen and restore time of the same process, medians of interleaved runs.

    sudo python3 benchmarks/core.py                        everything, on the disk this lies on: some 15 minutes
    sudo python3 benchmarks/core.py --quick                10 and 250 MB, three rounds: one minute
    sudo python3 benchmarks/core.py --store tmpfs          checkpoints in memory: what the disk does not limit

On tmpfs the largest size needs 16 GB of memory. It needs root, a CRIU bundle (``CHREK_CRIU_BUNDLE``, or
``.venv/share/chrek/criu``), ``unshare`` and ``nsenter``, and no container runtime. Results go to
``benchmarks/results/core-CORES.json`` and ``.md`` after each size; ``benchmarks/plot.py`` draws them.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from core_bench import place, report
from core_bench.contenders import ChReK, Stock
from core_bench.rounds import Size, measure

MB = 1_000_000
RESULTS = Path(__file__).resolve().parent / "results"
SIZES = (
    Size("10 MB", 10 * MB),
    Size("0.25 GB", 250 * MB),
    Size("1 GB", 1000 * MB),
    Size("4 GB", 4000 * MB),
    Size("4 GB half zero", 2000 * MB, 2000 * MB),
)


def main() -> int:
    """Measure and write the results."""
    arguments = _arguments()
    if os.geteuid():
        print("core.py: CRIU needs root", file=sys.stderr)
        return 1
    place.enter_private_mounts()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    bundle = Path(os.environ.setdefault("CHREK_CRIU_BUNDLE", str(_bundle())))
    with tempfile.TemporaryDirectory(prefix=".chrek-bench-", dir=arguments.directory) as name:
        scratch = Path(name)
        scratch.chmod(0o755)
        if place.kind_of(Path("/run")) != "tmpfs":
            place.mount_tmpfs(Path("/run"))
        if arguments.store == "tmpfs":
            place.mount_tmpfs(scratch)
        try:
            results = _measure(arguments, scratch, bundle)
        finally:
            if arguments.store == "tmpfs":
                subprocess.run(["umount", str(scratch)], check=False)
    print(report.table(results))
    return 0


def _measure(arguments: argparse.Namespace, scratch: Path, bundle: Path) -> dict[str, Any]:
    (scratch / "store").mkdir()
    stock = Stock(bundle, scratch, scratch / "stock")
    chrek = ChReK(scratch / "store")
    wanted = arguments.sizes.split(",") if arguments.sizes else [size.name for size in SIZES]
    began = time.monotonic()
    results: dict[str, Any] = {"machine": _machine(scratch, stock), "rounds": arguments.rounds, "sizes": []}
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"{arguments.name or f'core-{len(os.sched_getaffinity(0))}'}.json"
    for size in SIZES:
        if size.name in wanted:
            samples = measure(size, stock=stock, chrek=chrek, scratch=scratch, rounds=arguments.rounds, say=_say(began))
            results["sizes"].append(asdict(samples))
            report.write(results, target)
    print(f"core.py: written to {target}")
    return results


def _machine(scratch: Path, stock: Stock) -> dict[str, Any]:
    model = next(
        (line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    memory = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(int(memory.split()[1]) * 1024 / 1e9, 1),
        "kernel": platform.release(),
        "criu": stock.version,
        "python": platform.python_version(),
        "store": place.kind_of(scratch),
        "load": round(os.getloadavg()[2], 1),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _say(began: float) -> Any:  # noqa: ANN401 - a function
    return lambda text: print(f"[{time.monotonic() - began:6.1f} s] {text}", flush=True)


def _bundle() -> Path:
    for bundle in (Path(__file__).resolve().parents[1] / ".venv/share/chrek/criu", Path("/opt/chrek/criu")):
        if (bundle / "criu").is_file():
            return bundle
    sys.exit("core.py: no CRIU bundle; run tools/setup-criu or set CHREK_CRIU_BUNDLE")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10 and 250 MB, three rounds")
    parser.add_argument("--sizes", help="names of sizes, separated by commas: " + ", ".join(s.name for s in SIZES))
    parser.add_argument("--rounds", type=int, help="how often each contender runs (5)")
    parser.add_argument("--store", choices=("disk", "tmpfs"), default="disk", help="where checkpoints go (disk)")
    parser.add_argument("--directory", help="where on disk (beside the sources)")
    parser.add_argument("--name", help="name of the results' files (core-CORES)")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.sizes = arguments.sizes or "10 MB,0.25 GB"
    arguments.rounds = arguments.rounds or (3 if arguments.quick else 5)
    arguments.directory = arguments.directory or str(Path(__file__).resolve().parents[1])
    return arguments


if __name__ == "__main__":
    sys.exit(main())
