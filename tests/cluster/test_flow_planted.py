"""A workload that plants links, pipes and devices at every path the agent touches leads it nowhere.

The trap is a file system of the node that no container mounts. The kernel reports who opens anything on it: whoever
followed a planted link from the node's root, or from the agent's own, would be seen there.
"""

from __future__ import annotations

import json
import secrets
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster import flow
from cluster.kube import Cluster
from cluster.place import Place, make_place
from cluster.situations import ENTRYPOINT
from cluster.workspace import Manifest
from system.opens import Opens

KINDS = ("link", "dots", "magic", "pipe", "device")
PLANT = """
plant() {
    case $KIND in
        link) ln -s $TRAP/secret $1 ;;
        dots) ln -s ../../../../../../../../../..$TRAP/secret $1 ;;
        magic) ln -s /proc/self/root$TRAP/secret $1 ;;
        pipe) mkfifo $1 ;;
        device) mknod $1 c 1 5 ;;
    esac
}
"""
"""Device 1:5 is /dev/zero: who reads it to the end never comes back."""
JOB = f"""{PLANT}
is_file() {{ [ -f $1 ] && [ ! -L $1 ]; }}
mkdir -p /var/planted /tmp/folder
for path in /scratch/x /var/planted/x /tmp/signal.done /tmp/ready; do plant $path; done
ln -s $TRAP /scratch/way; ln -s $TRAP /var/planted/way
echo mine > /tmp/carried; echo mine > /tmp/folder/inside
touch /tmp/planted
until [ -e /tmp/go ]; do sleep 0.1; done
rm /tmp/ready; echo ready > /tmp/ready
until is_file /tmp/signal.done || is_file /tmp/dynamo-restored; do sleep 0.1; done
if is_file /tmp/dynamo-restored; then echo restored; sleep 1000; fi
cat /tmp/signal.done
"""
READY = "touch /tmp/ready; sleep 1000"
BEFORE = f"""{PLANT}
for path in /tmp/dynamo-restored /tmp/ready /tmp/signal.done /tmp/carried; do plant $path; done
ln -s $TRAP /tmp/folder
ln -s $TRAP /tmp/way
"""
"""What lies in the volume of a pod before it is restored."""


@dataclass(frozen=True)
class Planted:
    """A place, and the trap."""

    place: Place
    trap: Path
    secret: str
    opens: Opens

    def untouched(self) -> None:
        """Check that nobody opened, changed or added anything in the trap."""
        assert [each.name for each in self.trap.iterdir()] == ["secret"]
        assert (self.trap / "secret").read_text() == self.secret
        assert self.opens.seen == []

    def environment(self, kind: str) -> list[dict[str, str]]:
        """What the scripts need."""
        return [{"name": "KIND", "value": kind}, {"name": "TRAP", "value": str(self.trap)}]

    def job(self, kind: str) -> Manifest:
        """A pod that plants and waits."""
        manifest = flow.job(
            f"plants-{kind}",
            kind,
            image=self.place.image,
            args=[ENTRYPOINT, "bash", "-c", JOB],
            readinessProbe={"exec": {"command": ["test", "-e", "/tmp/planted"]}, "periodSeconds": 1},
        )
        _volumes(manifest)
        manifest["spec"]["containers"][0]["env"] += self.environment(kind)
        return manifest

    def restored(self, kind: str, checkpoint_id: str, **variables: str) -> Manifest:
        """A pod to be restored, in whose /tmp somebody has planted before."""
        manifest = self.place.restored(f"{kind}-{checkpoint_id}", checkpoint_id)
        _volumes(manifest)
        (main,) = manifest["spec"]["containers"]
        main["env"] += [{"name": name, "value": value} for name, value in variables.items()]
        before = {"name": "before", "image": main["image"], "command": ["bash", "-c", BEFORE]}
        manifest["spec"]["initContainers"] = [
            {**before, "env": self.environment(kind), "volumeMounts": main["volumeMounts"]}
        ]
        return manifest


def _volumes(manifest: Manifest) -> None:
    manifest["spec"]["volumes"] = [{"name": name, "emptyDir": {}} for name in ("tmp", "scratch")]
    mounts = [{"name": name, "mountPath": f"/{name}"} for name in ("tmp", "scratch")]
    manifest["spec"]["containers"][0]["volumeMounts"] = mounts


@pytest.fixture(scope="module")
def planted(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Planted]:
    """A pod of each kind, captured after it had waited with its plants beside another pod's whole capture."""
    folder = tmp_path_factory.mktemp("planted")
    trap = folder / "trap"
    trap.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(trap)], check=True)
    try:
        secret = secrets.token_hex(16)
        (trap / "secret").write_text(secret)
        with make_place(cluster, folder, "planted") as place, Opens(trap) as opens:
            yield Planted(place, trap, secret, opens)
    finally:
        subprocess.run(["umount", "-l", str(trap)], check=True)


@pytest.fixture(scope="module")
def captured(planted: Planted) -> dict[str, list[str]]:
    """The events on each pod before its ready file was a file; then all are captured."""
    workspace = planted.place.workspace
    workspace.apply(*(planted.job(kind) for kind in KINDS))
    for kind in KINDS:
        workspace.ready(f"plants-{kind}")
    workspace.apply(flow.job("beside", "beside", image=planted.place.image))
    assert flow.wait_annotation(workspace, "beside", flow.RESULT).startswith("created ")
    before = {kind: flow.events(workspace, f"plants-{kind}") for kind in KINDS}
    for kind in KINDS:
        assert workspace.exec(f"plants-{kind}", "touch", "/tmp/go").status == 0
    return before


@pytest.mark.parametrize("kind", KINDS)
def test_capture(planted: Planted, captured: dict[str, list[str]], kind: str) -> None:
    """No plant counts as the ready file; the signal file takes a plant's place; nothing is followed or hangs."""
    workspace = planted.place.workspace
    name = f"plants-{kind}"
    assert captured[kind] == []
    assert flow.wait_annotation(workspace, name, flow.RESULT).startswith("created "), flow.events(workspace, name)
    assert workspace.ended(name).status.phase == "Succeeded"
    said = workspace.logs(name)
    signal, _ = json.JSONDecoder().raw_decode(said[said.index("{") :])
    assert signal["success"] is True
    assert not _holds(planted.place.agent.store / kind, planted.secret.encode())
    planted.untouched()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "device"])
def test_restore(planted: Planted, captured: dict[str, list[str]], kind: str) -> None:
    """Marker, ready file and a volume's files take the places of plants; the workload's own plants are there as they were."""
    workspace = planted.place.workspace
    manifest = planted.restored(kind, kind)
    name = manifest["metadata"]["name"]
    workspace.apply(manifest)
    assert flow.wait_annotation(workspace, name, flow.START).startswith("restored "), workspace.logs(name)
    workspace.wait_log(name, "restored")
    for path in ("/tmp/dynamo-restored", "/tmp/carried", "/tmp/folder/inside"):
        assert _type(planted, name, path) == "regular file", path
    assert _type(planted, name, "/tmp/folder") == "directory"
    expected = "fifo" if kind == "pipe" else "symbolic link"
    assert {_type(planted, name, path) for path in ("/scratch/x", "/var/planted/x")} == {expected}
    planted.untouched()


def test_devices_are_not_handed_on(planted: Planted, captured: dict[str, list[str]]) -> None:
    """A checkpoint that would make a device node is not restored; the pod starts cold and says which."""
    assert captured["device"] == []
    start = planted.place.start(planted.restored("device", "device"))
    assert start.startswith("cold/PRIVILEGE_EXCEEDED "), start
    refused = flow.wait_event(planted.place.workspace, "device-device", "RestoreRefused")
    assert "the character device 1:5" in refused
    planted.untouched()


def test_signal_file_behind_a_link(planted: Planted) -> None:
    """A link in the signal file's path stays inside the container: where it leads nowhere there, the agent says so."""
    place = planted.place
    for name, target in (("inwards", "/etc"), ("outwards", str(planted.trap))):
        manifest = flow.job(
            name, name, image=place.image, args=[ENTRYPOINT, "bash", "-c", f"ln -s {target} /tmp/way; {READY}"]
        )
        manifest["spec"]["containers"][0]["env"][0]["value"] = "/tmp/way/signal"
        place.workspace.apply(manifest)
    for name in ("inwards", "outwards"):
        assert flow.wait_annotation(place.workspace, name, flow.RESULT).startswith("created ")
    assert '"inwards"' in place.workspace.exec("inwards", "cat", "/etc/signal").output
    assert not Path("/etc/signal").exists()
    assert flow.events(place.workspace, "outwards") == ["CheckpointStarted", "CheckpointFailed", "CheckpointCreated"]
    failed = flow.wait_event(place.workspace, "outwards", "CheckpointFailed")
    assert failed.startswith("WRITE_FAILED: The signal file /tmp/way/signal cannot be written"), failed
    planted.untouched()


def test_marker_behind_a_link(planted: Planted) -> None:
    """A marker that could only be written through a planted link is not written: the pod starts cold."""
    manifest = planted.restored("link", "one", DYN_RESTORE_MARKER_FILE="/tmp/way/marker")
    start = planted.place.start(manifest)
    assert start.startswith("cold/FILES_NOT_APPLIED "), start
    assert flow.events(planted.place.workspace, "link-one") == ["RestoreFailed", "StartedCold"]
    planted.untouched()


def _type(planted: Planted, pod: str, path: str) -> str:
    return planted.place.workspace.exec(pod, "stat", "-c", "%F", path).output.strip()


def _holds(folder: Path, text: bytes) -> bool:
    """Whether a file below a folder has these bytes."""
    return any(text in each.read_bytes() for each in folder.resolve().rglob("*") if each.is_file())
