"""Where the demo on Kubernetes runs: a cluster, and the chart in a namespace of its own; all that is made is taken away."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator

from cluster import flow
from cluster.kube import Cluster, ClusterError, Layout
from cluster.kube.layout import CHECKOUT, KUBELET_ROOT
from cluster.kube.lifecycle import borrowed, exclusive
from cluster.workspace import Workspace

CHART = str(CHECKOUT / "deploy/helm/charts/chrek")


@contextlib.contextmanager
def installed(cluster: Cluster, namespace: str) -> Iterator[Workspace]:
    """The chart in a namespace of its own, its store in a folder of ``.cache``; all of it is removed afterwards."""
    store = CHECKOUT / ".cache/demo" / f"store-{os.getpid()}-cluster"
    seccomp = KUBELET_ROOT / "seccomp"
    there = seccomp.exists()
    with Workspace.make(cluster, namespace) as workspace:
        try:
            workspace.apply(flow.host_volume(namespace, store))
            values = {"storage.pvc.storageClass": namespace, "containerRuntime.storage": cluster.layout.containerd_root}
            options = [f"--set={name}={value}" for name, value in values.items()]
            cluster.helm("install", "chrek", CHART, f"--namespace={namespace}", *options, "--wait", "--timeout=120s")
            yield workspace
        finally:
            # Upwards: whatever one step says, the others are done.
            with _undisturbed(), contextlib.ExitStack() as steps:
                if not there:
                    steps.callback(shutil.rmtree, seccomp, ignore_errors=True)
                steps.callback(shutil.rmtree, store, ignore_errors=True)
                steps.callback(flow.remove_signals)
                wait = ("--ignore-not-found", "--wait", "--timeout=120s")
                steps.callback(_insist, cluster.kubectl, "delete", "persistentvolume", namespace, *wait)
                kinds = "pods,jobs,persistentvolumeclaims"
                steps.callback(_insist, cluster.kubectl, "delete", kinds, "--all", f"--namespace={namespace}", *wait)
                steps.callback(_insist, cluster.helm, "uninstall", "chrek", f"--namespace={namespace}", *wait)


def _insist(command: Callable[..., str], *words: str) -> None:
    """Run a command again that was interrupted: a signal of the terminal reaches it too."""
    for _ in range(5):
        with contextlib.suppress(ClusterError):
            command(*words)
            return
    command(*words)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Let no signal stop what is being taken away."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def node(layout: Layout, say: Callable[[str], None]) -> Iterator[Cluster]:
    """A cluster for the demo; from one that was up already, the images that the demo brings are taken away again."""
    try:
        with exclusive(wait=0):
            pass
    except ClusterError:
        say("another program uses this machine's test cluster; waiting for its end, ten minutes at most")
    with borrowed(layout, say) as cluster:
        before = cluster.images()
        try:
            yield cluster
        finally:
            with _undisturbed():
                for image in set(cluster.images()) - set(before):
                    cluster.remove_image(image)
