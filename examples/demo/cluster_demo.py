"""The demo on a real one-node Kubernetes: a pod started cold, a Job that is checkpointed, the same pod restored.

The chart is installed by helm, and the files of ``examples/kubernetes`` are applied with only image and namespace
changed. The pod is one file, applied twice: before there is a checkpoint it starts cold, afterwards restored.

Seconds are those of a user who asks for the pod and waits for the server's first answer. The API's time of a pod's
creation has whole seconds, so a pod is created at the beginning of one. Two other clocks begin later: when the
container starts, and when the agent's restore does; both are taken from the lines that they log, whose times the
API gives with nanoseconds.
"""

from __future__ import annotations

import datetime as dt
import http.client
import json
import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
sys.path[:0] = [str(REPO / "tests"), str(HERE)]  # the cluster is the one of the tests

from cluster import flow  # noqa: E402
from cluster.kube import ClusterError, Layout, missing  # noqa: E402
from cluster.workspace import Manifest, Workspace  # noqa: E402
from cluster_images import Images, make_images  # noqa: E402
from cluster_place import installed, node  # noqa: E402

PICTURE = HERE / "images/receipt.png"
JOB, POD = "checkpoint-job.yaml", "restored-pod.yaml"
PORT = 8000
PATIENCE = 300.0
"""Seconds after which a server that has not answered never will."""


def say(text: str) -> None:
    """Print one line of progress, with the seconds since the demo began."""
    print(f"[{time.monotonic() - BEGAN:6.2f} s] {text}", flush=True)


# --- one pod -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """How a pod came to answer; seconds from the pod's creation, and from its container's start."""

    how: str
    from_pod: float
    from_container: float
    answered: float
    lines: list[dict[str, Any]]


def start(workspace: Workspace, manifest: Manifest) -> Start:
    """Create the pod of a manifest at the beginning of a second; wait for its server's first answer."""
    name: str = manifest["metadata"]["name"]
    now = time.time()
    time.sleep(1.02 - now % 1.0)
    workspace.apply(manifest)
    address = workspace.wait_pod(name, lambda pod: pod.status.pod_ip, what="the pod's address").status.pod_ip
    lines = first_answer(address)
    answered = time.time()
    how = flow.wait_annotation(workspace, name, flow.START)
    created = workspace.core.read_namespaced_pod(name, workspace.namespace).metadata.creation_timestamp
    said = _logged(workspace, f"pod/{name}", r"chrek: start=\S+ reason=\S+ seconds=(?P<seconds>[\d.]+)")
    return Start(how, answered - created.timestamp(), answered - said, answered, lines)


def first_answer(address: str) -> list[dict[str, Any]]:
    """Send the picture until it is answered; return the lines of text that the server read."""
    deadline = time.monotonic() + PATIENCE
    while True:
        connection = http.client.HTTPConnection(address, PORT, timeout=PATIENCE)
        try:
            connection.request("POST", "/read", PICTURE.read_bytes())
            response = connection.getresponse()
            text = response.read()
            if response.status != http.HTTPStatus.OK:
                raise ClusterError(f"the server answered {response.status}: {text[:200]!r}")
            found: list[dict[str, Any]] = json.loads(text)["lines"]
            return found
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)  # nothing tells when a port opens
        finally:
            connection.close()


def _logged(workspace: Workspace, source: str, pattern: str) -> float:
    """Return when what a log's line tells began: its time, less the seconds that the line says."""
    log = workspace.cluster.kubectl("--namespace", workspace.namespace, "logs", "--timestamps", source)
    for line in reversed(log.splitlines()):
        found = re.search(pattern, line)
        if found:
            # Python reads microseconds, the kubelet writes nanoseconds.
            when = re.sub(r"(\.\d{6})\d*", r"\1", line.split()[0])
            return dt.datetime.fromisoformat(when).timestamp() - float(found["seconds"])
    raise ClusterError(f"the log of {source} has no line like {pattern}:\n{log[-2000:]}")


# --- the demo ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What the demo measured; seconds."""

    cold: Start
    checkpoint: float
    frozen: float
    restored: Start
    engine: float

    @property
    def same(self) -> bool:
        """Whether the restored server's answer is the cold one's, and it was restored."""
        return self.restored.how.startswith("restored ") and self.restored.lines == self.cold.lines

    def clocks(self) -> str:
        """Return the line about the other clocks."""
        return (
            f"counted from the container's start: cold {self.cold.from_container:.2f} s, restore "
            f"{self.restored.from_container:.2f} s; from the start of ChReK's restore: {self.engine:.2f} s"
        )

    def sentence(self) -> str:
        """Return the demo's last line; its seconds are counted from the pods' creation."""
        return (
            f"cluster-demo: cold {self.cold.from_pod:.2f} s, checkpoint {self.checkpoint:.2f} s (frozen {self.frozen:.2f} s), "
            f"restore {self.restored.from_pod:.2f} s, answers {'identical' if self.same else 'DIFFERENT'}"
        )


def demo(workspace: Workspace, images: Images) -> Run:
    """Start cold, checkpoint, start again from the checkpoint, compare."""
    pod = flow.example(workspace, POD, image=images.server)
    say(f"kubectl apply -f examples/kubernetes/{POD}    (there is no checkpoint yet)")
    cold = start(workspace, pod)
    say(f"first answer {cold.from_pod:.2f} s after the pod's creation ({cold.how}): {words(cold.lines)}")
    remove_pod(workspace, pod)
    say(f"kubectl apply -f examples/kubernetes/{JOB}")
    checkpoint, frozen = take_checkpoint(workspace, flow.example(workspace, JOB, image=images.server))
    say(f"job complete; checkpoint in {checkpoint:.2f} s, the server frozen for {frozen:.2f} s of them")
    say(f"kubectl apply -f examples/kubernetes/{POD}    (the same file)")
    restored = start(workspace, pod)
    say(f"first answer {restored.from_pod:.2f} s after the pod's creation ({restored.how}): {words(restored.lines)}")
    engine = _logged(workspace, "daemonset/chrek-agent", r'"restored in [\d.]+ s".*"seconds": ?(?P<seconds>[\d.]+)')
    remove_pod(workspace, pod)
    return Run(cold, checkpoint, frozen, restored, restored.answered - engine)


def remove_pod(workspace: Workspace, manifest: Manifest) -> None:
    """Delete the pod of a manifest, and wait until it is gone."""
    name: str = manifest["metadata"]["name"]
    workspace.core.delete_namespaced_pod(name, workspace.namespace, grace_period_seconds=1)
    workspace.wait_gone(name)


def take_checkpoint(workspace: Workspace, job: Manifest) -> tuple[float, float]:
    """Apply the Job and wait for its end; return the seconds from its first event to the last, and those frozen."""
    workspace.apply(job)
    name = flow.pod_of_job(workspace, job["metadata"]["name"])
    flow.wait_job(workspace, job["metadata"]["name"], "Complete", seconds=PATIENCE)
    told = workspace.core.list_namespaced_event(
        workspace.namespace, field_selector=f"involvedObject.name={name},reportingComponent=chrek-agent"
    ).items
    found = {event.reason: event for event in told}
    if not {"CheckpointStarted", "CheckpointCreated"} <= found.keys():
        raise ClusterError(f"the agent told of {name}: {[f'{each.reason}: {each.message}' for each in told]}")
    made = found["CheckpointCreated"]
    frozen = re.search(r"stood still for ([\d.]+) s", made.message)
    if frozen is None:
        raise ClusterError(f"no time of standing still in {made.message!r}")
    return (made.event_time - found["CheckpointStarted"].event_time).total_seconds(), float(frozen[1])


def words(lines: list[dict[str, Any]]) -> str:
    """Return the text that was read, in one line."""
    return " / ".join(line["text"] for line in lines)


def main() -> int:
    """Run the demo; return its exit status."""
    layout = Layout()
    absent = missing(layout)
    if absent:
        raise ClusterError("Kubernetes cannot be started here: " + "; ".join(absent))
    say("a one-node Kubernetes")
    with node(layout, say) as cluster:
        images = make_images(cluster, say)
        namespace = f"cluster-demo-{os.getpid()}"
        say(f"helm install chrek deploy/helm/charts/chrek --namespace {namespace}")
        with installed(cluster, namespace) as workspace:
            run = demo(workspace, images)
            say("helm uninstall chrek, and the rest of what the demo made")
    print(run.clocks())
    print(run.sentence())
    return 0 if run.same else 1


BEGAN = time.monotonic()
if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        sys.exit(main())
    except (AssertionError, ClusterError) as error:  # the tests' calls assert
        print("\n".join([f"cluster-demo: {error}", *getattr(error, "__notes__", [])]), file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("cluster-demo: interrupted; everything is removed", file=sys.stderr)
        sys.exit(130)
