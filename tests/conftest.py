"""What all tests share: nothing of the machine's own settings reaches them."""

from __future__ import annotations

import os

import pytest

FOREIGN = ("DYN_", "CRIU_", "CHREK_", "CUDA_", "WAIT_FOR_CHECKPOINT", "RESTORE_WAIT_TIMEOUT", "DEBUG")
KEPT = ("CHREK_CRIU_BUNDLE", "CHREK_DEBIAN_MIRROR", "CHREK_CRIU_SUITE")


@pytest.fixture(autouse=True, scope="session")
def _plain_environment() -> None:
    """Take the variables that ChReK reads out of the environment, but those that say where its parts are."""
    for name in list(os.environ):
        if name.startswith(FOREIGN) and name not in KEPT:
            del os.environ[name]
