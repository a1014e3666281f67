"""Record what /proc says of each case on a GPU machine: ``python record_evidence.py DIRECTORY CASE...``.

``CASE`` is a name of `workloads.CASES`, with variables before it if need be: ``NCCL_P2P_DISABLE=1,nccl``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from chrek.cuda import abi, evidence
from chrek.cuda.driver import Driver
from gpu.harness import start, stop, tree


def record(driver: Driver, process: subprocess.Popen[str], title: str) -> str:
    """The recording of a workload's tree."""
    text = f"# {title}\n# driver CUDA {driver.cuda_version_text()}, kernel {os.uname().release}\n"
    for pid in tree(process.pid):
        code, state = driver.state(pid)
        name = abi.state_name(state) if code == abi.Code.SUCCESS else "none"
        text += evidence.read(pid, driver_state=name).text()
    return text


def main(directory: str, cases: list[str]) -> None:
    """Record every case into ``DIRECTORY/<case>.txt``."""
    driver = Driver()
    for case in cases:
        try:
            process = start(case)
        except RuntimeError as error:
            sys.stderr.write(f"{case}: {error}\n")
            continue
        try:
            name = case.replace(",", "-").replace("=", "")
            Path(directory, f"{name}.txt").write_text(record(driver, process, case))
            sys.stderr.write(f"{case}: recorded\n")
        finally:
            stop(process)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
