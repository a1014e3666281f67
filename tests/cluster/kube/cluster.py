"""A running cluster, as tests and people use it."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from . import api, processes
from .errors import ClusterError
from .layout import CRI_SOCKET, NODE, Layout

_WATCHERS = ("kube-controller-manager", "kube-scheduler", "kubelet")


@dataclass(frozen=True)
class Cluster:
    """The way into a cluster that is up."""

    layout: Layout = field(default_factory=Layout)

    @property
    def kubeconfig(self) -> Path:
        """The administrator's."""
        return self.layout.kubeconfig

    @property
    def node(self) -> str:
        """The name of the only node."""
        return NODE

    @property
    def cri_socket(self) -> Path:
        """Where containerd listens."""
        return CRI_SOCKET

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """Run kubectl as administrator; gives its output.

        Raises:
            ClusterError: it failed; the message is what it said.
        """
        return self._run("kubectl", *arguments, stdin=stdin)

    def helm(self, *arguments: str) -> str:
        """Run helm as administrator; gives its output.

        Raises:
            ClusterError: it failed; the message is what it said.
        """
        return self._run("helm", *arguments)

    def import_image(self, archive: Path) -> None:
        """Load an image archive (docker or OCI form) into the node."""
        self._ctr("images", "import", str(archive))

    def images(self) -> list[str]:
        """The names of the images on the node."""
        return self._ctr("images", "list", "--quiet").split()

    def remove_image(self, name: str) -> None:
        """Forget an image."""
        self._ctr("images", "remove", name)

    def remove_pods(self) -> None:
        """Stop and remove every pod of the node, behind the API server's back."""
        self._run("kubeone", "cri", f"unix://{CRI_SOCKET}", "clean")

    def log(self, program: str) -> str:
        """What one of the cluster's programs has said."""
        return (self.layout.logs / f"{program}.log").read_text(errors="replace")

    def stop(self, program: str, *, grace: float = 5.0) -> None:
        """End one of the cluster's programs; `grace` 0 kills it."""
        processes.stop(self.layout, [program], grace=grace)

    def start(self, program: str) -> None:
        """Start a program again that was stopped, and wait until it serves.

        Those that watch the API server wait longer after each time it was away, up to 30 s, and everything a
        test does next would wait with them: they are started anew with it.
        """
        processes.start(self.layout, program)
        self.wait_until_serving(program)
        if program == "kube-apiserver":
            watchers = [name for name in _WATCHERS if name in processes.alive(self.layout)]
            processes.stop(self.layout, watchers, grace=0)
            for name in watchers:
                processes.start(self.layout, name)
            self.wait_until_serving("kubelet")

    def restart(self, program: str, *, grace: float = 5.0) -> None:
        """Stop and start; pods live on through all of them."""
        self.stop(program, grace=grace)
        self.start(program)

    def wait_until_serving(self, program: str) -> None:
        """Wait until a program answers, where it is one that is asked."""
        if program == "containerd":
            processes.wait_for("containerd", 30, self._containerd_answers)
        elif program == "kube-apiserver":
            processes.wait_for("API server", 90, lambda: api.answers(self.layout, "/readyz"))
        elif program == "kubelet":
            processes.wait_for("kubelet", 60, lambda: api.kubelet_knows_its_pods(self.layout, NODE))

    def _containerd_answers(self) -> bool:
        command = [str(self.layout.kubeone), "cri", f"unix://{CRI_SOCKET}", "version"]
        return CRI_SOCKET.exists() and subprocess.run(command, capture_output=True, check=False).returncode == 0

    def _ctr(self, *arguments: str) -> str:
        return self._run("ctr", "--address", str(CRI_SOCKET), "--namespace", "k8s.io", *arguments)

    def _run(self, program: str, *arguments: str, stdin: str | None = None) -> str:
        environment = processes.environment(self.layout) | {"KUBECONFIG": str(self.kubeconfig)}
        done = subprocess.run(
            [program, *arguments],
            executable=self.layout.binaries / program,
            env=environment,
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            message = f"`{program} {' '.join(arguments)}` failed: {done.stderr.strip() or done.stdout.strip()}"
            raise ClusterError(message)
        return done.stdout
