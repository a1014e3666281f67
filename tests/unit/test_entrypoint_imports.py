"""The init is the first process of every container: what it imports is paid for each time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "src"
HEAVY = {
    "dataclasses",
    "typing",
    "json",
    "re",
    "inspect",
    "pathlib",
    "logging",
    "subprocess",
    "threading",
}


def test_a_cold_start_imports_nothing_heavy() -> None:
    """Everything a cold start needs comes without the modules that cost milliseconds and megabytes."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import chrek.entrypoint.init\n"
        "print(' '.join(sorted(sys.modules)))"
    )
    modules = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, str(SOURCE)], check=True, capture_output=True, text=True
    ).stdout.split()
    assert HEAVY.isdisjoint(modules), HEAVY & set(modules)
    assert len([name for name in modules if name.startswith("chrek.")]) < 20
