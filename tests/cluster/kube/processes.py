"""The cluster's programs as processes: their command lines, how they are started, found and stopped.

A program is found by two variables in its environment, not by a file of process ids: a file can be lost
or name a stranger, the environment cannot, so that also what an interrupted start left is found again.
"""

from __future__ import annotations

import os
import select
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ClusterError
from .layout import API_PORT, ETCD_PORT, KUBELET_ROOT, NODE, NODE_IP, SERVICE_RANGE, Layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_MARK = "CHREK_TEST_CLUSTER"


@dataclass(frozen=True)
class Program:
    """One of the cluster's programs; it is called by its name, whatever file it is in."""

    name: str
    file: Path
    arguments: tuple[str, ...]


def programs(layout: Layout) -> dict[str, Program]:
    """All programs by name, in the order of their start."""
    kubeone, run, pki = layout.kubeone, layout.run, layout.pki
    etcd = f"http://127.0.0.1:{ETCD_PORT}"
    every = (
        Program("containerd", layout.binaries / "containerd", ("--config", f"{run}/containerd.toml")),
        Program(
            "etcd",
            kubeone,
            (
                f"--data-dir={run}/etcd",
                f"--listen-client-url={etcd}",
                f"--listen-peer-url=http://127.0.0.1:{ETCD_PORT + 1}",
            ),
        ),
        Program(
            "kube-apiserver",
            kubeone,
            (
                f"--etcd-servers={etcd}",
                f"--bind-address={NODE_IP}",
                f"--advertise-address={NODE_IP}",
                f"--secure-port={API_PORT}",
                f"--service-cluster-ip-range={SERVICE_RANGE}",
                "--authorization-mode=Node,RBAC",
                "--enable-admission-plugins=NodeRestriction",
                f"--client-ca-file={pki}/ca.crt",
                f"--tls-cert-file={pki}/apiserver.crt",
                f"--tls-private-key-file={pki}/apiserver.key",
                f"--kubelet-certificate-authority={pki}/ca.crt",
                f"--kubelet-client-certificate={pki}/apiserver-kubelet.crt",
                f"--kubelet-client-key={pki}/apiserver-kubelet.key",
                # The node's name cannot be looked up.
                "--kubelet-preferred-address-types=InternalIP",
                "--service-account-issuer=https://kubernetes.default.svc",
                f"--service-account-key-file={pki}/sa.pub",
                f"--service-account-signing-key-file={pki}/sa.key",
                "--allow-privileged=true",
                "--profiling=false",
            ),
        ),
        Program(
            "kube-controller-manager",
            kubeone,
            (
                f"--kubeconfig={run}/controller-manager.kubeconfig",
                f"--service-account-private-key-file={pki}/sa.key",
                f"--root-ca-file={pki}/ca.crt",
                f"--cluster-signing-cert-file={pki}/ca.crt",
                f"--cluster-signing-key-file={pki}/ca.key",
                "--use-service-account-credentials",
                "--leader-elect=false",
                # With the default of 20 a second, its controllers are there 3.5 s later.
                "--kube-api-qps=300",
                "--kube-api-burst=600",
                "--bind-address=127.0.0.1",
                "--profiling=false",
            ),
        ),
        Program(
            "kube-scheduler",
            kubeone,
            (
                f"--kubeconfig={run}/scheduler.kubeconfig",
                "--leader-elect=false",
                "--bind-address=127.0.0.1",
                "--profiling=false",
            ),
        ),
        Program("kube-proxy", kubeone, (f"--config={run}/kube-proxy.yaml",)),
        Program(
            "kubelet",
            kubeone,
            (
                f"--config={run}/kubelet.yaml",
                f"--kubeconfig={run}/kubelet.kubeconfig",
                f"--hostname-override={NODE}",
                f"--node-ip={NODE_IP}",
                f"--root-dir={KUBELET_ROOT}",
                f"--cert-dir={pki}",
                "--v=2",
            ),
        ),
    )
    return {program.name: program for program in every}


def environment(layout: Layout) -> dict[str, str]:
    """A small environment of our own: nothing of the caller's (proxies, kubeconfigs) gets in."""
    path = f"{layout.binaries}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return {"PATH": path, "HOME": str(layout.run), "LANG": "C.UTF-8", _MARK: str(layout.run)}


def start(layout: Layout, name: str) -> None:
    """Start a program in a session of its own, so that a Ctrl-C in the terminal does not reach it."""
    program = programs(layout)[name]
    layout.logs.mkdir(exist_ok=True)
    log = str(layout.logs / f"{name}.log")
    os.posix_spawn(
        program.file,
        [name, *program.arguments],
        environment(layout),
        setsid=True,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644),
            (os.POSIX_SPAWN_DUP2, 1, 2),
            *((os.POSIX_SPAWN_CLOSE, descriptor) for descriptor in _inheritable()),
        ],
    )


def _inheritable() -> list[int]:
    """Descriptors that a child would get; a pipe among them would keep our caller's reader waiting."""
    found = []
    for entry in os.listdir("/proc/self/fd"):
        try:
            if int(entry) > 2 and os.get_inheritable(int(entry)):
                found.append(int(entry))
        except OSError:
            continue
    return found


def alive(layout: Layout) -> dict[str, int]:
    """Process id by name of each program that runs."""
    names = programs(layout).keys()
    return {name: pid for pid, name in _marked(layout) if name in names}


def stop(layout: Layout, names: Iterable[str], *, grace: float = 5.0) -> None:
    """End programs side by side; one that has not ended after `grace` seconds is killed."""
    running = alive(layout)
    end([running[name] for name in names if name in running], grace=grace)


def kill_rest(layout: Layout) -> None:
    """Kill everything that descends from the cluster's programs: shims, above all."""
    end([pid for pid, _ in _marked(layout)], grace=0)


def end(pids: Iterable[int], *, grace: float) -> None:
    """End processes and wait until they are gone (or are zombies of another parent)."""
    handles = {}
    for pid in pids:
        try:
            handles[pid] = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
    try:
        if grace:
            _signal(handles.values(), signal.SIGTERM, wait=grace)
        _signal(handles.values(), signal.SIGKILL, wait=5.0)
    finally:
        for pid, handle in handles.items():
            os.close(handle)
            _reap(pid)


def _signal(handles: Iterable[int], number: signal.Signals, *, wait: float) -> None:
    poll = select.poll()
    waiting = set()
    for handle in handles:
        try:
            signal.pidfd_send_signal(handle, number)
        except ProcessLookupError:
            continue
        poll.register(handle, select.POLLIN)
        waiting.add(handle)
    deadline = time.monotonic() + wait
    while waiting and (left := deadline - time.monotonic()) > 0:
        for handle, _ in poll.poll(left * 1000):
            poll.unregister(handle)
            waiting.discard(handle)


def _reap(pid: int) -> None:
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return


def wait_for(what: str, seconds: float, probe: Callable[[], bool]) -> None:
    """Ask `probe` until it says yes; none of these programs offers an event to wait on.

    Raises:
        ClusterError: it did not say yes within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not probe():
        if time.monotonic() > deadline:
            message = f"{what}: not there after {seconds:.0f} s"
            raise ClusterError(message)
        time.sleep(0.1)


def _marked(layout: Layout) -> list[tuple[int, str]]:
    """Id and argv[0] of every process with our mark in its environment."""
    mark = f"{_MARK}={layout.run}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        try:
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                name = (entry / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
                found.append((int(entry.name), name))
        except OSError:
            continue
    return found
