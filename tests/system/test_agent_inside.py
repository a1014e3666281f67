"""What the agent looks at and writes in a container, whatever the workload has planted there."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from chrek.agent import inside, liveness
from chrek.engine import imagefacts
from chrek.engine.container import Container as Engine
from chrek.errors import Reason, Refused
from containers import Mount, needs
from system import cycle
from system.cycle import Make

pytestmark = needs("containers")


def _started(container: Make, script: str) -> Engine:
    """A container in which a script has run; it says ready afterwards."""
    made = cycle.start(container, [cycle.INIT, "--", "sh", "-c", f"{script}; echo ready; exec sleep 1000"])
    return Engine(made.pid1)


def test_only_a_regular_file_is_a_ready_file(container: Make) -> None:
    """A file is one, also behind a link inside; a pipe, a directory, a device and a link to nowhere are none."""
    script = (
        "cd /tmp; echo > file; ln -s file link; mkfifo pipe; mkdir folder; ln -s /dev/null device; ln -s nowhere gone"
    )
    engine = _started(container, script)
    assert inside.is_file(engine, "/tmp/file")
    assert inside.is_file(engine, "/tmp/link")
    for name in ("pipe", "folder", "device", "gone", "absent"):
        assert not inside.is_file(engine, f"/tmp/{name}"), name
        assert engine.read_file(f"/tmp/{name}") is None, name


def test_links_never_lead_out(container: Make, tmp_path: Path) -> None:
    """A link to a path of the node is looked up in the container's own root, through /proc too."""
    secret = tmp_path / "secret"
    secret.write_text("node's own")
    script = f"ln -s {secret} /tmp/absolute; ln -s ../../../../../../../../..{secret} /tmp/dots; ln -s /proc/1/root /tmp/root"
    engine = _started(container, script)
    for path in ("/tmp/absolute", "/tmp/dots", f"/tmp/root{secret}"):
        assert engine.read_file(path) is None, path


def test_large_files_are_read_in_part(container: Make) -> None:
    """However large a file is, no more than 64 KiB of it come into the agent."""
    engine = _started(container, "truncate -s 1G /tmp/large")
    data = engine.read_file("/tmp/large")
    assert data is not None
    assert len(data) == 65536


def test_build_id_is_believed_only_as_a_short_text(container: Make) -> None:
    """What checkpoint-enable wrote is read; nonsense in its place counts as nothing."""
    assert imagefacts.build_id(_started(container, "true")) is None
    good = _started(container, """mkdir -p /opt/chrek; echo '{"build_id": "abc"}' > /opt/chrek/image.json""")
    assert imagefacts.build_id(good) == "abc"
    bad = _started(container, """mkdir -p /opt/chrek; echo '{"build_id": ["a"]}' > /opt/chrek/image.json""")
    assert imagefacts.build_id(bad) is None


def test_store_is_compared_by_device_and_inode(container: Make, tmp_path: Path) -> None:
    """The same directory is accepted under any name, another is refused, and none at all is fine."""
    for name in ("store", "other"):
        (tmp_path / name).mkdir()
    mounts = [Mount.bind(tmp_path / "store", "/checkpoints"), Mount.bind(tmp_path / "other", "/elsewhere")]
    made = cycle.start(container, [cycle.INIT, "--", "sh", "-c", "echo ready; exec sleep 1000"], mounts=mounts)
    engine, store = Engine(made.pid1), str(tmp_path / "store")
    inside.check_store(engine, "/checkpoints/id", store)
    inside.check_store(engine, None, store)
    inside.check_store(engine, "/nowhere/id", store)
    with pytest.raises(Refused) as caught:
        inside.check_store(engine, "/elsewhere/id", store)
    assert caught.value.reason is Reason.STORE_MISMATCH


def test_liveness_probe_that_bears_too_little(container: Make) -> None:
    """A probe that bears less than the freeze is refused with both numbers, unless the user allows it."""
    engine = _started(container, "true")
    liveness.check(engine.pid1, None, allow=())
    liveness.check(engine.pid1, 30, allow=())
    with pytest.raises(Refused, match=r"0\.\d s; its liveness probe bears 0 s") as caught:
        liveness.check(engine.pid1, 0.1, allow=())
    assert caught.value.reason is Reason.LIVENESS_TOO_TIGHT
    liveness.check(engine.pid1, 0.1, allow=(Reason.LIVENESS_TOO_TIGHT,))


def test_container_that_is_gone(container: Make) -> None:
    """Looking into a container that has ended is a refusal, not a fault."""
    made = cycle.start(container, [cycle.INIT, "--", "sh", "-c", "echo ready; exec sleep 1000"])
    engine = Engine(made.pid1)
    assert stat.S_ISDIR(os.stat(f"/proc/{made.pid1}/root").st_mode)
    made.kill(9)
    made.wait()
    with pytest.raises(Refused):
        inside.is_file(engine, "/tmp/file")
