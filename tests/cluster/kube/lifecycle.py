"""Up and down.

Both hold one lock of the machine, so two of them never meet. `up` first removes what a killed predecessor
left, and removes what it has made itself when it fails or is interrupted; `down` works on anything between
nothing and a whole cluster.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from . import api, build, config, host, needs, pki, processes
from .cluster import Cluster
from .errors import ClusterError
from .layout import NODE, Layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_LOCK = Path("/run/chrek-cluster.lock")
_PROXY_BINDING = {
    "apiVersion": "rbac.authorization.k8s.io/v1",
    "kind": "ClusterRoleBinding",
    "metadata": {"name": "test-cluster-proxy"},
    "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:node-proxier"},
    "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "system:kube-proxy"}],
}


def _silent(_message: str) -> None:
    return


@contextlib.contextmanager
def exclusive(*, wait: float = 600.0) -> Iterator[None]:
    """Hold the machine's one cluster for oneself.

    Raises:
        ClusterError: another process holds it for longer than `wait` seconds.
    """
    lock = os.open(_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    holder = os.pread(lock, 32, 0).decode().strip()
                    message = f"process {holder} has used this machine's test cluster for {wait:.0f} s; try later"
                    raise ClusterError(message) from None
                time.sleep(0.2)
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(lock)


def running(layout: Layout) -> Cluster | None:
    """The cluster that is up, if all its programs are."""
    complete = layout.ready.exists() and processes.alive(layout).keys() == processes.programs(layout).keys()
    return Cluster(layout) if complete else None


def up(layout: Layout, say: Callable[[str], None] = _silent) -> Cluster:
    """Build what is missing, then start a cluster; call it with `exclusive`.

    Raises:
        ClusterError: it is up already, this machine cannot have one, or a step failed; nothing is left then.
    """
    if running(layout):
        message = "a cluster is up already; take it `down` first"
        raise ClusterError(message)
    absent = needs.missing(layout)
    if absent:
        message = "no test cluster on this machine: " + "; ".join(absent)
        raise ClusterError(message)
    build.build(layout, say)
    down(layout)
    try:
        return _start(layout, say)
    except BaseException as error:
        excerpt = _log_excerpt(layout) if isinstance(error, ClusterError) else ""
        down(layout)
        if excerpt:
            error.add_note(excerpt)
        raise


def down(layout: Layout) -> None:
    """End the cluster and take away all that it and its pods left; call it with `exclusive`.

    Raises:
        ClusterError: something could not be removed; the message names it.
    """
    processes.stop(layout, ["kubelet", "kube-proxy", "kube-scheduler", "kube-controller-manager"])
    if "containerd" in processes.alive(layout):
        # What it does not manage is killed below.
        with contextlib.suppress(ClusterError):
            Cluster(layout).remove_pods()
    # Their data goes anyway, and the API server takes long to end while watches are open.
    processes.stop(layout, ["kube-apiserver", "etcd"], grace=0)
    processes.stop(layout, ["containerd"])
    processes.kill_rest(layout)
    if layout.run.exists():
        host.restore(layout)
        host.forget(layout)


@contextlib.contextmanager
def borrowed(layout: Layout, say: Callable[[str], None] = _silent) -> Iterator[Cluster]:
    """A cluster for a while: one that somebody keeps up, else one that is taken down afterwards.

    Raises:
        ClusterError: as `up`, `down` and `exclusive`.
    """
    with exclusive():
        kept = running(layout) if layout.kept.exists() else None
        if kept is not None:
            yield kept
            return
        # Whatever is there now was left by a session that was killed.
        down(layout)
        cluster = up(layout, say)
        try:
            yield cluster
        finally:
            down(layout)


def _start(layout: Layout, say: Callable[[str], None]) -> Cluster:
    cluster = Cluster(layout)
    layout.run.mkdir(mode=0o755)
    host.remember(layout)
    pki.write(layout)
    config.write(layout)
    say("certificates and configuration")
    host.prepare()
    for name in ("containerd", "etcd", "kube-apiserver"):
        processes.start(layout, name)
    cluster.wait_until_serving("containerd")
    for archive in sorted(layout.images.glob("*.tar")):
        cluster.import_image(archive)
    say("containerd and images")
    cluster.wait_until_serving("kube-apiserver")
    say("API server")
    for name in ("kube-controller-manager", "kube-scheduler", "kubelet"):
        processes.start(layout, name)
    # kubeadm would bind this role to kube-proxy's service account; here it is a process with a user's name.
    api.call(layout, "POST", "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings", _PROXY_BINDING)
    processes.start(layout, "kube-proxy")
    processes.wait_for("node", 60, lambda: api.node_is_ready(layout, NODE))
    say("node")
    account = "/api/v1/namespaces/default/serviceaccounts/default"
    processes.wait_for("default service account", 60, lambda: api.answers(layout, account))
    layout.ready.touch()
    return cluster


def _log_excerpt(layout: Layout) -> str:
    parts = []
    for log in sorted(layout.logs.glob("*.log")):
        lines = log.read_text(errors="replace").splitlines()[-5:]
        parts += [f"--- {log.name}", *lines]
    return "\n".join(parts)
