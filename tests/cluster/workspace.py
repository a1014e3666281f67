"""A test's namespace, and the calls that tests make in it, over the official client.

Waiting is watching: every `wait_*` follows the API server's own events and gives up after a deadline.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.kube import Cluster
from cluster.kube.layout import BUSYBOX_IMAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# The client's types are half there: every field optional, most functions untyped.
kubernetes: Any = importlib.import_module("kubernetes")
_stream: Any = importlib.import_module("kubernetes.stream").stream
Manifest = dict[str, Any]


def pod(name: str, script: str, *, container: Manifest | None = None, **spec: object) -> Manifest:
    """A pod that runs a shell script in busybox; `container` and `spec` add to it."""
    main = {"name": "main", "image": BUSYBOX_IMAGE, "command": ["sh", "-c", script], **(container or {})}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        # A shell as PID 1 ignores SIGTERM; nobody waits 30 s for that.
        "spec": {"restartPolicy": "Never", "terminationGracePeriodSeconds": 1, "containers": [main], **spec},
    }


@dataclass(frozen=True)
class Result:
    """How a command inside a container ended."""

    status: int
    output: str


@dataclass(frozen=True)
class Workspace:
    """One namespace of a cluster."""

    cluster: Cluster
    namespace: str
    api: Any

    @classmethod
    @contextlib.contextmanager
    def make(cls, cluster: Cluster, namespace: str) -> Iterator[Workspace]:
        """Create the namespace; it is deleted afterwards, without waiting for its end."""
        api = kubernetes.config.new_client_from_config(config_file=str(cluster.kubeconfig))
        core = kubernetes.client.CoreV1Api(api)
        core.create_namespace({"metadata": {"name": namespace}})
        workspace = cls(cluster, namespace, api)
        try:
            workspace.wait(
                core.list_namespaced_service_account,
                lambda account: account.metadata.name == "default",
                what="default service account",
            )
            yield workspace
        finally:
            core.delete_namespace(namespace, propagation_policy="Background")
            api.close()

    @property
    def core(self) -> Any:  # noqa: ANN401 - the client's models have no types
        """Pods, events, volumes."""
        return kubernetes.client.CoreV1Api(self.api)

    def apply(self, *manifests: Manifest) -> None:
        """Create objects of any kind in this namespace."""
        for manifest in manifests:
            kubernetes.utils.create_from_dict(self.api, manifest, namespace=self.namespace)

    def wait(
        self,
        listing: Callable[..., Any],
        wanted: Callable[[Any], bool],
        *,
        what: str,
        seconds: float = 60,
        **selection: str,
    ) -> Any:  # noqa: ANN401
        """The first object of a listing that is as wanted, watched until then."""
        deadline = time.monotonic() + seconds
        watch = kubernetes.watch.Watch()
        last = None
        while (left := deadline - time.monotonic()) > 0:
            events = watch.stream(listing, self.namespace, timeout_seconds=max(1, int(left)), **selection)
            with contextlib.closing(events):
                for event in events:
                    last = event["object"]
                    if event["type"] != "DELETED" and wanted(last):
                        return last
        raise AssertionError(f"{what}: not seen within {seconds:.0f} s; last state:\n{last}")

    def wait_pod(self, name: str, wanted: Callable[[Any], bool], *, what: str, seconds: float = 60) -> Any:  # noqa: ANN401
        """Watch one pod until it is as wanted."""
        selector = f"metadata.name={name}"
        return self.wait(self.core.list_namespaced_pod, wanted, what=what, seconds=seconds, field_selector=selector)

    def ready(self, name: str, *, seconds: float = 60) -> Any:  # noqa: ANN401
        """Watch a pod until its condition Ready is true."""
        return self.wait_pod(name, is_ready, what=f"pod {name} ready", seconds=seconds)

    def ended(self, name: str, *, seconds: float = 60) -> Any:  # noqa: ANN401
        """Watch a pod until it has succeeded or failed."""
        return self.wait_pod(
            name, lambda pod: pod.status.phase in {"Succeeded", "Failed"}, what=f"pod {name} ended", seconds=seconds
        )

    def wait_gone(self, name: str, *, seconds: float = 60) -> None:
        """Watch a pod until it is deleted."""
        selector = f"metadata.name={name}"
        found = self.core.list_namespaced_pod(self.namespace, field_selector=selector)
        if not found.items:
            return
        events = kubernetes.watch.Watch().stream(
            self.core.list_namespaced_pod,
            self.namespace,
            field_selector=selector,
            resource_version=found.metadata.resource_version,
            timeout_seconds=int(seconds),
        )
        with contextlib.closing(events):
            assert any(event["type"] == "DELETED" for event in events), f"pod {name} is still there"

    def logs(self, name: str, container: str = "main") -> str:
        """What a container has written so far."""
        return str(self.core.read_namespaced_pod_log(name, self.namespace, container=container))

    def wait_log(self, name: str, words: str, *, container: str = "main", seconds: float = 60) -> str:
        """Follow a container's log until a line has these words; gives the line."""
        lines = kubernetes.watch.Watch().stream(
            self.core.read_namespaced_pod_log,
            name,
            self.namespace,
            container=container,
            _request_timeout=(5, seconds),
        )
        with contextlib.closing(lines):
            for line in lines:
                if words in line:
                    return str(line)
        raise AssertionError(f"container {container} of pod {name} ended without saying {words!r}")

    def exec(self, name: str, *command: str, container: str = "main") -> Result:
        """Run a command in a container, as `kubectl exec` does."""
        connection = _stream(
            self.core.connect_get_namespaced_pod_exec,
            name,
            self.namespace,
            command=list(command),
            container=container,
            stdout=True,
            stderr=True,
            _preload_content=False,
        )
        try:
            connection.run_forever(timeout=60)
            # The status first: reading the output drops what is left on the other channels.
            return Result(connection.returncode, connection.read_all())
        finally:
            connection.close()


def is_ready(pod: Any) -> bool:  # noqa: ANN401
    """Whether a pod's condition Ready is true."""
    return any(each.type == "Ready" and each.status == "True" for each in pod.status.conditions or [])
