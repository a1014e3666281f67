"""The cache of kernel features with the real CRIU."""

from __future__ import annotations

from pathlib import Path

import pytest

from chrek.criu import features
from chrek.criu.bundle import Bundle
from chrek.store.layout import Store
from containers import needs
from system import cycle
from system.cycle import Make

pytestmark = [needs("containers", "criu", "cap_sys_admin"), pytest.mark.timeout(120)]


def test_made_outside_and_used_inside(container: Make, store: Store, tmp_path: Path) -> None:
    """A capture uses what was found outside the container, and says so in its log; nothing stays in the checkpoint."""
    assert features.prepare(Bundle.find())
    source = cycle.start(container, cycle.app("beat"))
    (source.root / features.NAME).write_bytes(b"planted")
    cycle.capture(source, store)
    files = {path.name: path for path in Path(store.path, "one").rglob("*")}
    assert features.NAME not in files
    log = files["dump.log"].read_text(errors="replace")
    assert f"Loaded kdat cache from {features.NAME}" in log
    assert "Stale" not in log


def test_kept_for_us_alone(tmp_path: Path) -> None:
    """The cache is made once, in a directory and file that only we may read or write."""
    kept = tmp_path / "kept"
    bundle = Bundle.find()
    assert features.prepare(bundle, kept)
    file = features.path_of(bundle, kept)
    made = file.stat()
    assert (kept.stat().st_mode & 0o777, made.st_mode & 0o777) == (0o700, 0o600)
    assert features.prepare(bundle, kept)
    assert file.stat().st_mtime_ns == made.st_mtime_ns
    assert features.load(bundle, kept)
