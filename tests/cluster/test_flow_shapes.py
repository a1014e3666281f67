"""Pods of every shape on a real node: the table of the guide says what works and what is refused, and this is where it was seen.

Each pod that works is captured and restored, and so is its copy's memory: the token that the source drew. Each
that does not is refused by its code before anything is touched: its application ends by itself, told by the
signal file. Shapes that other situations need as well (one container, no capabilities, shared process ids, a
`subPath`, a tight liveness probe, little memory) are in `situations.py` and `test_flow_agent.py`.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from cluster import flow
from cluster.agents import Agent
from cluster.appimage import app_image
from cluster.kube import Cluster
from cluster.kube.layout import BUSYBOX_IMAGE, CHECKOUT
from cluster.place import NOTHING
from cluster.workspace import Manifest, Workspace, kubernetes

ENTRYPOINT = "/usr/local/bin/smart-entrypoint.sh"
GUIDE = (CHECKOUT / "docs/guide.md").read_text()

# The guide's sample without a server: pods on the node's own network must not fight for a port.
APPLICATION = """
import os, random, sys, time
token = random.SystemRandom().randbytes(8).hex()
print("drawn:", token, flush=True)
{before}
signal_file = os.environ.get("DYN_CHECKPOINT_SIGNAL_FILE")
if signal_file:
    open(os.environ["DYN_CHECKPOINT_READY_FILE"], "w").write("ready")
    while not os.path.exists("/tmp/dynamo-restored"):
        if os.path.exists(signal_file):
            sys.exit()
        time.sleep(0.05)
{after}
print("serves:", token, flush=True)
open("/tmp/serving", "w").close()
time.sleep(1000)
"""

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One shape of a pod.

    Attributes:
        guide: how the guide's table names it.
        container: the name of the application's container.
        spec, main: what it changes in the pod's spec, and in that container.
        before, after: what its application does before it is ready, and after the checkpoint or restore.
        sidecar: a second container stands beside it.
        code: why it is refused; empty: it works.
        says: a part of the refusal's message.
    """

    name: str
    guide: str
    container: str = "main"
    spec: Mapping[str, Any] = field(default_factory=dict)
    main: Mapping[str, Any] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    before: str = ""
    after: str = ""
    sidecar: bool = False
    code: str = ""
    says: str = ""


def _volume(kind: Json, path: str) -> tuple[Json, Json]:
    """A volume, as a pod's spec and as a container's part."""
    return {"volumes": [{"name": "it", **kind}]}, {"volumeMounts": [{"name": "it", "mountPath": path}]}


EMPTY_TMP = _volume({"emptyDir": {}}, "/tmp")
CONFIG = _volume({"configMap": {"name": "settings"}}, "/config")
SECRET = _volume({"secret": {"secretName": "secrets"}}, "/config")
TOKEN = _volume({"projected": {"sources": [{"serviceAccountToken": {"path": "key"}}]}}, "/config")
READ_ONLY = {"securityContext": {**NOTHING, "readOnlyRootFilesystem": True}}
PROXY = {"name": "proxy", "image": BUSYBOX_IMAGE, "command": ["sleep", "1000"]}
OPEN = 'held = open("/config/key")'
WATCH = """
import ctypes
libc = ctypes.CDLL(None)
assert libc.inotify_add_watch(libc.inotify_init1(0), os.path.realpath("/config/key").encode(), 2) >= 0
"""
SYSV = "import ctypes; assert ctypes.CDLL(None).shmget(0, 4096, 0o1600) >= 0"
TERMINAL = 'assert os.isatty(0) and os.isatty(1); os.close(os.open("/dev/tty", os.O_RDWR))'
RESTRICTED = {**NOTHING, "runAsNonRoot": True, "runAsUser": 65534}

WORKS = (
    Shape(
        name="native-sidecar",
        guide="native sidecars",
        spec={"initContainers": [{**PROXY, "restartPolicy": "Always"}]},
    ),
    Shape(
        name="chosen",
        guide="several with the chosen one named",
        container="server",
        annotations={"nvidia.com/checkpoint-container": "server"},
        sidecar=True,
    ),
    Shape(
        name="default",
        guide="several with the chosen one named",
        container="server",
        annotations={"kubectl.kubernetes.io/default-container": "server"},
        sidecar=True,
    ),
    Shape(name="called-main", guide="several with the chosen one named", sidecar=True),
    Shape(
        name="read-only-root",
        guide="read-only root with an emptyDir at `/tmp`",
        spec=EMPTY_TMP[0],
        main={**READ_ONLY, **EMPTY_TMP[1]},
    ),
    Shape(name="host-network", guide="`hostNetwork: true`", spec={"hostNetwork": True}),
    Shape(name="terminal", guide="`tty: true`", main={"tty": True, "stdin": True}, before=TERMINAL, after=TERMINAL),
    Shape(name="non-root", guide="non-root", main={"securityContext": RESTRICTED}),
)

REFUSED = (
    Shape(name="host-pid", guide="`hostPID`", spec={"hostPID": True}, code="POD_NOT_SUPPORTED", says="hostPID: true"),
    Shape(name="host-ipc", guide="`hostIPC`", spec={"hostIPC": True}, code="POD_NOT_SUPPORTED", says="hostIPC: true"),
    Shape(
        name="system-v",
        guide="System V IPC",
        before=SYSV,
        code="SYSV_IPC_IN_USE",
        says="1 System V shared memory segments",
    ),
    Shape(
        name="config-map",
        guide="open ConfigMap",
        spec=CONFIG[0],
        main=CONFIG[1],
        before=OPEN,
        code="WATCH_UNRESTORABLE",
    ),
    Shape(name="secret", guide="Secret", spec=SECRET[0], main=SECRET[1], before=OPEN, code="WATCH_UNRESTORABLE"),
    Shape(name="token", guide="token files", spec=TOKEN[0], main=TOKEN[1], before=OPEN, code="WATCH_UNRESTORABLE"),
    Shape(
        name="watched", guide="open ConfigMap", spec=CONFIG[0], main=CONFIG[1], before=WATCH, code="WATCH_UNRESTORABLE"
    ),
    Shape(
        name="no-tmp",
        guide="read-only root without a volume at `/tmp`",
        spec=_volume({"emptyDir": {}}, "/run/app")[0],
        main={**READ_ONLY, **_volume({"emptyDir": {}}, "/run/app")[1]},
        code="NO_TMP",
    ),
)


@dataclass(frozen=True)
class Scene:
    """A namespace that admits every pod, and its agent."""

    workspace: Workspace
    agent: Agent
    image: str

    def source(self, shape: Shape) -> Manifest:
        """The pod that is captured."""
        manifest = flow.job(f"{shape.name}-source", shape.name, image=self.image, **self._main(shape))
        return self._shaped(manifest, shape)

    def copy(self, shape: Shape) -> Manifest:
        """The pod that is restored."""
        manifest = flow.restored(f"{shape.name}-copy", shape.name, image=self.image, **self._main(shape))
        manifest["spec"]["containers"][0]["readinessProbe"] = {
            "exec": {"command": ["test", "-e", "/tmp/serving"]},
            "periodSeconds": 1,
        }
        return self._shaped(manifest, shape)

    def _main(self, shape: Shape) -> Json:
        code = APPLICATION.format(before=shape.before, after=shape.after)
        return {"args": [ENTRYPOINT, "python3", "-c", code], **shape.main}

    def _shaped(self, manifest: Manifest, shape: Shape) -> Manifest:
        manifest["spec"].update(shape.spec)
        manifest["spec"]["containers"][0]["name"] = shape.container
        manifest["metadata"]["annotations"] = dict(shape.annotations)
        if shape.sidecar:
            manifest["spec"]["containers"].append(PROXY)
        if shape.code == "NO_TMP":
            for each in manifest["spec"]["containers"][0]["env"]:
                each["value"] = each["value"].replace("/tmp/", "/run/app/")
            probe = manifest["spec"]["containers"][0]["readinessProbe"]
            probe["exec"]["command"] = ["cat", "/run/app/ready"]
        return manifest

    def log(self, pod: str, shape: Shape) -> str:
        """What the shape's application has said; a terminal ends its lines in its own way."""
        return self.workspace.logs(pod, shape.container).replace("\r", "")

    def remove(self, *names: str) -> None:
        """Let pods go at once."""
        for name in names:
            self.workspace.core.delete_namespaced_pod(name, self.workspace.namespace, grace_period_seconds=0)


@pytest.fixture(scope="module")
def scene(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """One agent for all."""
    with (
        Workspace.make(cluster, f"shapes-{os.getpid()}") as workspace,
        Agent(workspace, tmp_path_factory.mktemp("shapes")) as agent,
    ):
        files = {"metadata": {"name": "settings"}, "data": {"key": "value"}}
        workspace.core.create_namespaced_config_map(workspace.namespace, files)
        files = {"metadata": {"name": "secrets"}, "stringData": {"key": "value"}}
        workspace.core.create_namespaced_secret(workspace.namespace, files)
        yield Scene(workspace, agent, app_image(cluster))


def _word(log: str, before: str) -> str:
    return log.partition(f"{before}: ")[2].split()[0]


@pytest.mark.parametrize("shape", WORKS, ids=lambda shape: shape.name)
def test_works(scene: Scene, shape: Shape) -> None:
    """The pod is captured, its job ends well, and a pod of the same shape goes on with the same memory."""
    scene.workspace.apply(scene.source(shape))
    source, copy = f"{shape.name}-source", f"{shape.name}-copy"
    result = flow.wait_annotation(scene.workspace, source, flow.RESULT)
    assert result.startswith("created "), scene.agent.log[-3000:]
    scene.workspace.wait_pod(source, lambda pod: _ended(pod, shape.container), what="the job's end")
    drawn = _word(scene.log(source, shape), "drawn")
    scene.workspace.apply(scene.copy(shape))
    start = flow.wait_annotation(scene.workspace, copy, flow.START)
    assert start.startswith("restored "), scene.log(copy, shape) + scene.agent.log[-3000:]
    scene.workspace.ready(copy)
    assert _word(scene.log(copy, shape), "serves") == drawn
    scene.remove(source, copy)


def _ended(pod: Any, container: str) -> bool:  # noqa: ANN401 - the client's model
    """Whether a container has ended well; a sidecar keeps the pod itself from ending."""
    states = {each.name: each.state.terminated for each in pod.status.container_statuses or []}
    return states.get(container) is not None and states[container].exit_code == 0


@pytest.mark.parametrize("shape", REFUSED, ids=lambda shape: shape.name)
def test_refused(scene: Scene, shape: Shape) -> None:
    """The capture is refused by its code, the application is told and ends by itself, and its container ends with 172."""
    scene.workspace.apply(scene.source(shape))
    source = f"{shape.name}-source"
    assert flow.wait_annotation(scene.workspace, source, flow.RESULT).startswith(f"refused/{shape.code} ")
    (status,) = scene.workspace.ended(source).status.container_statuses
    assert status.state.terminated.exit_code == 172
    said = flow.wait_event(scene.workspace, source, "CheckpointRefused")
    assert said.startswith(f"{shape.code}: ")
    assert shape.says in said
    assert not (scene.agent.store / shape.name).exists()


def test_probes_during_a_capture(scene: Scene) -> None:
    """A liveness probe of every second that bears the freeze, and a readiness probe of every second, neither end nor repeat it."""
    manifest = scene.source(Shape(name="probed", guide="", before="weights = os.urandom(200 << 20)"))
    alive = {"exec": {"command": ["true"]}, "periodSeconds": 1, "failureThreshold": 30, "timeoutSeconds": 1}
    manifest["spec"]["containers"][0]["livenessProbe"] = alive
    scene.workspace.apply(manifest)
    assert flow.wait_annotation(scene.workspace, "probed-source", flow.RESULT).startswith("created ")
    (status,) = scene.workspace.ended("probed-source").status.container_statuses
    assert (status.state.terminated.exit_code, status.restart_count) == (0, 0)
    assert flow.events(scene.workspace, "probed-source") == ["CheckpointStarted", "CheckpointCreated"]


_numbers = itertools.count()


def _wait_refusal(scene: Scene, manifest: Manifest, feature: str) -> None:
    """Apply a pod that may not even run here; if it does, it is refused for that feature."""
    name: str = manifest["metadata"]["name"]
    scene.workspace.apply(manifest)
    assert flow.wait_annotation(scene.workspace, name, flow.RESULT).startswith("refused/POD_NOT_SUPPORTED ")
    assert feature in flow.wait_event(scene.workspace, name, "CheckpointRefused")


@pytest.mark.parametrize("name", ["gvisor", "kata-qemu", "runsc"])
def test_sandboxed_runtime(scene: Scene, name: str) -> None:
    """A pod of a runtime class that stands for a sandbox is refused by that class; here runc stands in for the sandbox."""
    runtime = f"{name}-{os.getpid()}-{next(_numbers)}"
    classes = kubernetes.client.NodeV1Api(scene.workspace.api)
    classes.create_runtime_class({"metadata": {"name": runtime}, "handler": "runc"})
    try:
        manifest = scene.source(Shape(name=runtime, guide="gVisor, Kata", spec={"runtimeClassName": runtime}))
        _wait_refusal(scene, manifest, f"runtimeClassName: {runtime}")
    finally:
        classes.delete_runtime_class(runtime)


@pytest.mark.parametrize("shape", [*WORKS, *REFUSED], ids=lambda shape: shape.name)
def test_guide_has_a_row(shape: Shape) -> None:
    """The guide's table names the shape in a row that says that it works, or by which code it is refused."""
    table = GUIDE.partition("## Will it work for my pod?")[2].partition("\n## ")[0]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("|")]
    (row,) = [row for row in rows if shape.guide in row[0]]
    assert row[1].startswith("works") if not shape.code else f"`{shape.code}`" in row[1]
