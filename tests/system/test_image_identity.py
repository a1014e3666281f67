"""Which image an application was captured in, and which it may be restored in, where no runtime can be asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chrek.errors import Reason, Refused
from chrek.store.layout import Store
from chrek.store.opening import open_checkpoint
from containers import needs
from system import cycle
from system.cycle import Make

pytestmark = needs("containers", "criu")

APP = cycle.app("beat")


def _layer(folder: Path, build_id: str) -> Path:
    """Return a layer with what `checkpoint-enable` writes into an image."""
    place = folder / build_id.replace(":", "-")
    (place / "opt/chrek").mkdir(parents=True)
    (place / "opt/chrek/image.json").write_text(json.dumps({"build_id": build_id, "cmd": []}))
    return place


def test_build_ids_are_compared(container: Make, store: Store, tmp_path: Path) -> None:
    """Another image's build id refuses the restore, naming both; the same one, or none, is no hindrance; it may be allowed."""
    first, other = _layer(tmp_path, "sha256:aaaa"), _layer(tmp_path, "sha256:bbbb")
    source = cycle.start(container, APP, lower=first)
    cycle.capture(source, store)
    source.delete()
    with open_checkpoint(store, "one") as checkpoint:
        assert checkpoint.manifest.provenance.build_id == "sha256:aaaa"
    copy = cycle.waiting(container, APP, lower=other)
    with pytest.raises(Refused) as caught:
        cycle.restore(copy, store)
    assert caught.value.reason is Reason.IMAGE_MISMATCH
    assert "sha256:aaaa" in caught.value.message
    assert "sha256:bbbb" in caught.value.message
    copy.wait_for("chrek: start=cold reason=IMAGE_MISMATCH")
    copy.delete()
    allowed = cycle.waiting(container, APP, lower=other)
    outcome = cycle.restore(allowed, store, allow=frozenset({Reason.IMAGE_MISMATCH}))
    assert any("sha256:bbbb" in warning for warning in outcome.warnings)
    allowed.delete()
    for layers in (first, ()):
        copy = cycle.waiting(container, APP, lower=layers)
        cycle.restore(copy, store)
        copy.wait_for("ok restored")
        copy.delete()


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"build_id": 7}', '{"build_id": ""}', "null", "\0", '{"build_id": "a\\nb"}']
)
def test_nonsense_in_its_place(container: Make, store: Store, text: str) -> None:
    """What the workload writes there instead counts as nothing."""
    code = (
        f"open('/opt/chrek/image.json', 'w').write({text!r}); print('ready', flush=True); import time; time.sleep(1000)"
    )
    source = cycle.start(container, [cycle.INIT, "--", "python3", "-c", code])
    cycle.capture(source, store)
    with open_checkpoint(store, "one") as checkpoint:
        assert checkpoint.manifest.provenance.build_id is None
