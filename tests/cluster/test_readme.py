"""The README's "Kubernetes in five commands", executed as they stand, with the output that stands beneath them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster import flow
from cluster.builder import Builder
from cluster.kube import Cluster
from cluster.kube.layout import CHECKOUT
from cluster.workspace import kubernetes

README = (CHECKOUT / "README.md").read_text()
NAMESPACE, CLASS = "my-app", "your-storage-class"
LATER = ("get pod", "logs")
"""Commands whose output may come a moment after the pod is ready."""


@dataclass(frozen=True)
class Command:
    """A command of the README, and what it prints."""

    line: str
    output: str


def commands(section: str) -> list[Command]:
    """Every command of a section's console blocks, in their order."""
    text = README.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    found = []
    for block in re.findall(r"```console\n(.*?)```", text, flags=re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            # A line that ends with a backslash goes on.
            match = re.match(r"((?:[^\n]*\\\n)*[^\n]*)\n(.*)", part, flags=re.DOTALL)
            assert match, part
            found.append(Command(match[1], match[2]))
    return found


def masked(text: str) -> str:
    """Output without what differs from run to run: numbers, dates, units of time, generated names, widths of columns."""
    text = re.sub(r"\b(Mon|Tue|Wed|Thu|Fri|Sat|Sun) [A-Z][a-z]{2} +\d+ [\d:]+ \d+", "DATE", text)
    text = re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+Z", "DATE", text)
    text = re.sub(r"\d+(\.\d+)*( (s|min|h|[KMG]?i?B)\b)?", "N", text)
    text = re.sub(r"checkpoint-my-model-\w{5}\b", "checkpoint-my-model-NAME", text)
    return re.sub(r"[ \t]+", " ", text).strip()


def agrees(said: str, wanted: str) -> bool:
    """Whether an output is the expected one, in which a line of dots stands for any lines."""
    parts = [re.escape(masked(part)) for part in re.split(r"^…$", wanted, flags=re.MULTILINE)]
    return re.fullmatch(r"\s*.*\s*".join(parts), masked(said), flags=re.DOTALL) is not None


@pytest.fixture
def shell(cluster: Cluster, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of the reader's shell: the tools of this cluster by their usual names, and an image of one's own."""
    builder = Builder(cluster)
    builder.make_debian()
    # The reader's own image: the server that the README names.
    command = ["python3", "/app/server.py"]
    builder.make_plain("localhost/my-app:latest", command=command, app=CHECKOUT / "tests/cluster/apps")
    _program(
        tmp_path / "buildah",
        f"""\
        case "$1" in
            bud) shift; set -- bud {shlex.join(builder.build_options)} "$@" ;;
            # Pushed is what the node has.
            push) {shlex.join(builder.command)} push -q "$2" docker-archive:{tmp_path}/pushed.tar:"$2" || exit
                {shlex.join(_ctr(cluster))} images import {tmp_path}/pushed.tar; status=$?
                rm {tmp_path}/pushed.tar; exit $status ;;
        esac
        exec {shutil.which("buildah")} {shlex.join(builder.command[1:])} "$@"
        """,
    )
    # containerd's storage is in another place here than on a node of its own.
    storage = f"--set=containerRuntime.storage={cluster.layout.containerd_root}"
    _program(tmp_path / "helm", f'exec {cluster.layout.binaries}/helm "$@" {storage}')
    api = kubernetes.config.new_client_from_config(config_file=str(cluster.kubeconfig))
    kubernetes.utils.create_from_dict(api, flow.host_volume(CLASS, tmp_path / "store"))
    before = set(cluster.images())
    try:
        yield builder.environment | {
            "PATH": f"{tmp_path}:{cluster.layout.binaries}:{os.environ['PATH']}",
            "KUBECONFIG": str(cluster.kubeconfig),
            "CHREK_BUILDER": "buildah",
        }
    finally:
        api.close()
        subprocess.run([cluster.layout.binaries / "helm", "uninstall", "chrek", f"--namespace={NAMESPACE}",
            f"--kubeconfig={cluster.kubeconfig}", "--wait"], capture_output=True, check=False)  # fmt: skip
        cluster.kubectl("delete", "namespace", NAMESPACE, "--ignore-not-found", "--wait", "--timeout=120s")
        cluster.kubectl("delete", "persistentvolume", CLASS, "--ignore-not-found")
        for image in set(cluster.images()) - before:
            cluster.remove_image(image)
        flow.remove_signals()


def _program(file: Path, text: str) -> None:
    file.write_text("#!/bin/sh\n" + textwrap.dedent(text))
    file.chmod(0o755)


def _ctr(cluster: Cluster) -> list[str]:
    return [str(cluster.layout.binaries / "ctr"), "--address", str(cluster.cri_socket), "--namespace", "k8s.io"]


def _run(command: Command, environment: dict[str, str]) -> str:
    done = subprocess.run(
        ["bash", "-ceuo", "pipefail", command.line],
        cwd=CHECKOUT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command.line}\n{done.stdout[-3000:]}"
    return done.stdout


def test_kubernetes_in_five_commands(shell: dict[str, str]) -> None:
    """Each command works as it stands, and prints what the README shows; numbers, dates and ages may differ."""
    first, *rest = commands("Kubernetes in five commands")
    shell |= dict(word.split("=", 1) for word in shlex.split(first.line)[1:])
    assert len(rest) >= 8
    for command in rest:
        deadline = time.monotonic() + 30
        said = _run(command, shell)
        while any(words in command.line for words in LATER) and not agrees(said, command.output):
            assert time.monotonic() < deadline, f"$ {command.line}\n{said}\n--- the README says\n{command.output}"
            time.sleep(0.2)
            said = _run(command, shell)
        sys.stdout.write(f"$ {command.line}\n{said[-1500:]}")
        assert agrees(said, command.output), f"$ {command.line}\n{said[-3000:]}\n--- the README says\n{command.output}"


def test_comparison_of_outputs() -> None:
    """A word that differs is found, a number that differs is not, and dots stand for lines."""
    assert agrees("a 17.3 MB\nx\ny\nthe end\n", "a 2.0 MB\n…\nthe end\n")
    assert not agrees("a 17.3 MB\nx\nanother end\n", "a 2.0 MB\n…\nthe end\n")
    assert not agrees("cold/NOT_FOUND seconds=1", "restored seconds=2")
