"""What the tests on a GPU machine share; elsewhere each skips with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import Popen

import pytest

from chrek.cuda.driver import Driver
from gpu import harness

Start = Callable[[str], Popen[str]]


@pytest.fixture(scope="session", autouse=True)
def _on_a_gpu_machine() -> None:
    if not list(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("needs an NVIDIA GPU")


@pytest.fixture(scope="session")
def driver() -> Driver:
    """The real driver."""
    return Driver()


@pytest.fixture
def start() -> Iterator[Start]:
    """Start programs of `workloads`; they are ended with the test."""
    running: list[Popen[str]] = []

    def begin(case: str) -> Popen[str]:
        running.append(harness.start(case))
        return running[-1]

    yield begin
    for process in running:
        harness.stop(process)
