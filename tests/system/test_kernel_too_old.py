"""A kernel without a call that ChReK needs: strace answers in its place as that kernel would."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from chrek.store.layout import Store
from containers import needs
from system import cycle
from system.cycle import Make

pytestmark = [needs("containers", "criu"), needs("strace")]

HERE = Path(__file__).parent


@pytest.mark.parametrize("program", ["capturer.py", "restorer.py"])
def test_openat2(container: Make, store: Store, program: str) -> None:
    """Without openat2, a capture and a restore are refused by name with the version that has it; nothing was touched."""
    source = cycle.start(container, cycle.app("beat"))
    where = source
    if program == "restorer.py":
        cycle.capture(source, store)
        where = cycle.waiting(container, cycle.app("beat"))
    inject = ["strace", "-qq", "-o", "/dev/null", "-e", "trace=openat2", "-e", "inject=openat2:error=ENOSYS"]
    argv = [*inject, sys.executable, str(HERE / program), str(where.pid1), store.path, "one", ""]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 172, done.stderr
    assert "KERNEL_TOO_OLD: " in done.stderr
    assert "Linux 5.6" in done.stderr
    if program == "restorer.py":
        where.wait_for("chrek: start=cold")
    else:
        assert not (Path(store.path) / "one").exists()
    before = source.log.count("beat")
    source.until(lambda: source.log.count("beat") > before + 1, what="the application to go on")
