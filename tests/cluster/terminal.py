"""What a person types while something is wrong: kubectl in a namespace, and `kubectl exec ds/chrek-agent`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.agents import Agent
from cluster.kube import processes
from cluster.kube.layout import CHECKOUT
from cluster.workspace import Workspace

AGENT_POD = "chrek-agent"
_PROGRAM = """#!/usr/bin/python3
import sys
sys.path[:0] = {libraries}
from chrek.cli import main
main()
"""


@dataclass(frozen=True)
class Terminal:
    """A shell whose kubectl is set to a namespace."""

    workspace: Workspace
    kubeconfig: Path

    @classmethod
    def open(cls, workspace: Workspace, folder: Path) -> Terminal:
        """Make the kubectl configuration in *folder*."""
        kubeconfig = folder / "kubeconfig"
        shutil.copy(workspace.cluster.kubeconfig, kubeconfig)
        terminal = cls(workspace, kubeconfig)
        terminal.run(f"kubectl config set-context --current --namespace {workspace.namespace}")
        return terminal

    def run(self, command: str) -> str:
        """Run a line as it would be typed; gives all it printed, however it ended."""
        layout = self.workspace.cluster.layout
        environment = processes.environment(layout) | {"KUBECONFIG": str(self.kubeconfig)}
        environment["PATH"] = f"{layout.binaries}:{environment.get('PATH', os.defpath)}"
        done = subprocess.run(
            ["bash", "-c", command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return done.stdout


def agent_pod(workspace: Workspace, agent: Agent, folder: Path, *, image: str) -> dict[str, Any]:
    """The DaemonSet `chrek-agent` as kubectl sees it: the agent's log, and `chrek` on its store.

    The agent itself is a process of the node here (`cluster.agents`), so that tests can end and start it in no time.
    """
    program = folder / "chrek"
    libraries = [str(CHECKOUT / "src"), sysconfig.get_path("purelib")]
    program.write_text(_PROGRAM.format(libraries=libraries))
    program.chmod(0o755)
    places = {
        "store": (agent.store, "/checkpoints"),
        "log": (agent.log_file, "/log"),
        "program": (program, "/usr/local/bin/chrek"),
        **{f"library-{number}": (path, path) for number, path in enumerate(libraries)},
    }
    container = {
        "name": "agent",
        "image": image,
        "command": ["tail", "-n", "+1", "-F", "/log"],
        "env": [{"name": "CHREK_STORE", "value": "/checkpoints"}],
        "volumeMounts": [{"name": name, "mountPath": path} for name, (_, path) in places.items()],
    }
    volumes = [{"name": name, "hostPath": {"path": str(path)}} for name, (path, _) in places.items()]
    labels = {"app": AGENT_POD}
    pod = {"terminationGracePeriodSeconds": 1, "containers": [container], "volumes": volumes}
    return {
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": {"name": AGENT_POD},
        "spec": {"selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels}, "spec": pod}},
    }
