"""What processes have and do, through capture and restore: real containers, stock CRIU.

Each feature is a small program in ``apps/``. It is captured while it runs; the source runs on and checks
itself; then it is restored, twice, in containers that are unprivileged and have other host names.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from chrek.store.layout import Store
from chrek.system.initstate import application
from containers import needs
from system import cycle
from system.cycle import Make

pytestmark = needs("containers", "criu")

FEATURES = sorted(path.stem.removeprefix("feature_") for path in cycle.APPS.glob("feature_*.py"))
ALONE = {"tcp_outside"}


@pytest.mark.parametrize("mode", ["lazy", "plain"])
@pytest.mark.parametrize("name", [name for name in FEATURES if name not in ALONE])
def test_feature_survives(name: str, mode: str, container: Make, store: Store) -> None:
    """What the feature's own first line says holds in the source afterwards and in two restored copies."""
    source = cycle.start(container, cycle.app(name))
    cycle.capture(source, store, mode=mode)
    source.exec(["touch", "/tmp/go"])  # noqa: S108 - in the container
    source.wait_for("ok source")
    source.delete()
    for _ in range(2):
        copy = cycle.waiting(container, cycle.app(name))
        cycle.restore(copy, store)
        copy.wait_for("ok restored")
        assert "chrek: start=restored" in copy.err
        copy.delete()


def test_client_outside(container: Make, store: Store) -> None:
    """A connection whose other end is outside the tree is closed in the restored application, not in the source."""
    source = container(
        cycle.app("tcp_outside"), mounts=[cycle.Mount.bind(cycle.APPS, "/apps", read_only=True)]
    )
    source.wait_for("listening")
    with source.connect(8080) as client:
        client.sendall(b"hello")
        source.wait_for("ready")
        outcome = cycle.capture(source, store)
        assert any("TCP" in warning for warning in outcome.warnings)
        source.exec(["touch", "/tmp/go"])  # noqa: S108 - in the container
        source.wait_for("ok source")
    copy = cycle.waiting(container, cycle.app("tcp_outside"))
    cycle.restore(copy, store)
    copy.wait_for("ok restored")


def test_three_generations(container: Make, store: Store) -> None:
    """A restored application is captured again and restored, and again; its seccomp filters do not grow."""
    source = cycle.start(container, cycle.app("beat"))
    filters = _filters(application(source.pid1))
    cycle.capture(source, store, "generation-0")
    for generation in range(3):
        copy = cycle.waiting(container, cycle.app("beat"), f"generation-{generation}")
        cycle.restore(copy, store, f"generation-{generation}")
        copy.wait_for(f" {copy.name}\n")
        assert _filters(application(copy.pid1)) == filters
        cycle.capture(copy, store, f"generation-{generation + 1}")


def _filters(pid: int) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line for line in lines if line.startswith("Seccomp_filters"))
