"""What all tests share: nothing of the machine's own settings reaches them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

with contextlib.suppress(ImportError):  # not on every machine with a GPU
    import hypothesis

    # A busy machine is no failure.
    hypothesis.settings.register_profile(
        "unhurried", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("unhurried")

FOREIGN = ("DYN_", "CRIU_", "CHREK_", "CUDA_", "WAIT_FOR_CHECKPOINT", "RESTORE_WAIT_TIMEOUT", "DEBUG")
KEPT = ("CHREK_CRIU_BUNDLE", "CHREK_DEBIAN_MIRROR", "CHREK_CRIU_SUITE")


@pytest.fixture(autouse=True, scope="session")
def _plain_environment() -> None:
    """Take the variables that ChReK reads out of the environment, but those that say where its parts are."""
    for name in list(os.environ):
        if name.startswith(FOREIGN) and name not in KEPT:
            del os.environ[name]


@pytest.fixture(autouse=True)
def _same_environment() -> Iterator[None]:
    """Give every test the environment that the first one had, whatever the code under test sets in it."""
    before = dict(os.environ)
    yield
    # Only what differs: a thread that a test left may be reading the environment (getenv(3) has no lock).
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    for name, value in before.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """Remove a test's files at its end: some tests make trees deeper than pytest's own clean-up can walk."""
    yield tmp_path
    try:
        shutil.rmtree(tmp_path, ignore_errors=True)
    except RecursionError:
        subprocess.run(["rm", "-rf", "--one-file-system", str(tmp_path)], check=False)
