"""What ChReK's init adds to the start of a container: time to the application, and memory while it runs.

    python3 benchmarks/init_start.py [ROUNDS]

Runs a program directly and under the init, in turn, and prints the medians. No root needed. The
interpreter is the one that runs this script, with ``-I -S`` as in the images; its own bare start is shown
beside. Then the start of the command line (``chrek --version``) and, as root, of a container of the tests.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO / "src"), str(REPO / "tests")]
INIT = REPO / "src/chrek/entrypoint/__main__.py"
PROBE = ["sh", "-c", "echo up; read line"]
BARE = [sys.executable, "-I", "-S", "-c", "print('up', flush=True); input()"]


def start(command: list[str]) -> tuple[float, int, int]:
    """Return the seconds until the program speaks, and the resident and private memory of its first process in KiB."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    process.stdout.readline()
    seconds = time.perf_counter() - began
    while len(os.listdir(f"/proc/{process.pid}/fd")) > 3 and "chrek-init" not in _links(process.pid):
        time.sleep(0.001)  # the init publishes its state just after the application has started
    rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    fields = {line.split(":")[0]: int(line.split()[1]) for line in rollup.splitlines()[1:]}
    process.communicate(b"\n")
    return seconds, fields["Rss"], fields["Private_Clean"] + fields["Private_Dirty"]


def version() -> float:
    """Return the seconds that ``chrek --version`` takes."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "chrek.cli", "--version"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def container() -> float:
    """Return the seconds until a container of the tests runs."""
    from containers import Container

    with Container(["/bin/sleep", "1000"]) as made:
        return made.start_seconds


def _links(pid: int) -> str:
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):  # closed between the two
            found.append(os.readlink(f"/proc/{pid}/fd/{name}"))
    return " ".join(found)


def main() -> None:
    """Measure and print."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 31
    programs = {
        "program alone": PROBE,
        "bare Python -I -S": BARE,
        "program under the init": [sys.executable, "-I", "-S", str(INIT), "--", *PROBE],
    }
    results: dict[str, list[tuple[float, int, int]]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, command in programs.items():
            results[name].append(start(command))
    print(f"machine: {os.cpu_count()} cores, {os.uname().machine}, Python {sys.version.split()[0]}, {rounds} rounds")
    for name, found in results.items():
        seconds, resident, private = (statistics.median(column) for column in zip(*found, strict=True))
        worst = max(item[0] for item in found)
        print(
            f"{name:24} median {1000 * seconds:6.1f} ms  worst {1000 * worst:6.1f} ms"
            f"  resident {resident / 1024:5.1f} MB  private {private / 1024:5.1f} MB"
        )
    starts = {"chrek --version": version, **({"container (runc)": container} if os.geteuid() == 0 else {})}
    for name, once in starts.items():
        once()  # what the first of all makes stays
        times = [once() for _ in range(rounds)]
        print(f"{name:24} median {1000 * statistics.median(times):6.1f} ms  worst {1000 * max(times):6.1f} ms")


if __name__ == "__main__":
    main()
