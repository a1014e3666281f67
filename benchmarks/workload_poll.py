"""How quickly, and at what price, a waiting application notices that it was restored.

    python3 benchmarks/workload_poll.py [SECONDS]

Prints the processor time that waiting takes, in percent of a core, and the delay from the marker to the
return of `chrek.workload.checkpoint_point`, for this machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src"
APPLICATION = """
import resource, sys, time
sys.path.insert(0, sys.argv[1])
from chrek.workload import checkpoint_point
def used():
    found = resource.getrusage(resource.RUSAGE_SELF)
    return found.ru_utime + found.ru_stime
start = []
checkpoint_point(before=[lambda: start.append(used())], refresh=False)
print(used() - start[0], time.time(), flush=True)
"""


def once(seconds: float) -> tuple[float, float]:
    """Wait this long; return the processor time used and the delay of the answer, in seconds."""
    with tempfile.TemporaryDirectory() as place:
        names = {"SIGNAL_FILE": "signal", "READY_FILE": "ready"}
        env = {f"DYN_CHECKPOINT_{name}": f"{place}/{file}" for name, file in names.items()}
        env["DYN_RESTORE_MARKER_FILE"] = f"{place}/marker"
        process = subprocess.Popen(
            [sys.executable, "-c", APPLICATION, str(SOURCE)], env=env, stdout=subprocess.PIPE, text=True
        )
        while not os.path.exists(f"{place}/ready"):
            time.sleep(0.001)
        time.sleep(seconds)
        began = time.time()
        Path(f"{place}/marker").touch()
        used, ended = map(float, process.communicate()[0].split())
        return used, ended - began


def main() -> None:
    """Measure and print."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 10.0
    used, _ = once(seconds)
    delays = sorted(once(0.1 + number * 0.0031)[1] for number in range(21))
    print(f"machine: {os.cpu_count()} cores, {os.uname().machine}, Python {sys.version.split()[0]}")
    print(f"waiting {seconds:g} s: {100 * used / seconds:.2f} % of a core")
    print(f"marker to return: median {1000 * delays[10]:.1f} ms, worst of 21 {1000 * delays[20]:.1f} ms")


if __name__ == "__main__":
    main()
