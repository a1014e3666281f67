"""The cluster comes and goes without a trace, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.conftest import require
from cluster.kube import Cluster, ClusterError, Layout, down, running, up
from cluster.kube.host import FOLDERS
from cluster.kube.layout import BUSYBOX_IMAGE, CHECKOUT
from cluster.kube.lifecycle import exclusive
from cluster.kube.processes import alive

COMMAND = [sys.executable, "-m", "tests.cluster.kube"]
_SYSCTLS = (
    "net/ipv4/ip_forward",
    "vm/overcommit_memory",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
)


# Other tests mount things of their own meanwhile.
_MOUNT_WORDS = ("kubelet", "containerd", "netns", "chrek-cluster", ".cache/cluster")


@dataclass(frozen=True)
class Host:
    """What a cluster could leave behind on its host."""

    mounts: list[str]
    links: str
    rules: str
    routes: str
    sysctls: list[str]
    cgroups: list[Path]
    folders: list[Path]
    processes: dict[str, int]

    @classmethod
    def now(cls, layout: Layout) -> Host:
        """Look at the host."""
        hierarchies = [Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").iterdir()]
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        return cls(
            mounts=[line for line in mounts if any(word in line for word in _MOUNT_WORDS)],
            links=_output("ip", "-brief", "link"),
            rules=_output("nft", "list", "ruleset"),
            routes=_output("ip", "route"),
            sysctls=[Path("/proc/sys", name).read_text() for name in _SYSCTLS],
            cgroups=sorted(path for each in hierarchies if each.is_dir() for path in each.glob("kube*")),
            folders=[path for path in (*FOLDERS, layout.run, layout.containerd_root) if path.exists()],
            processes=alive(layout),
        )


def _output(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def bare() -> Iterator[Layout]:
    """A machine without a cluster; one that somebody keeps up is theirs, so the test is skipped then."""
    layout = Layout()
    require(layout)
    with exclusive():
        if layout.kept.exists() and running(layout):
            pytest.skip("a cluster is kept up here by hand; take it down to run this")
        down(layout)
        yield layout
        down(layout)


def _run_a_pod(cluster: Cluster) -> None:
    cluster.kubectl("run", "app", f"--image={BUSYBOX_IMAGE}", "--", "sleep", "1000")
    cluster.kubectl("wait", "--for=condition=Ready", "pod/app", "--timeout=60s")


def _up_command() -> subprocess.Popen[str]:
    """`up` as a command of its own, under the lock that the test holds."""
    script = """
import contextlib, sys
from tests.cluster.kube import __main__ as command, lifecycle
lifecycle.exclusive = contextlib.nullcontext
sys.exit(command.main())
"""
    return subprocess.Popen([sys.executable, "-c", script, "up"], cwd=CHECKOUT, stdout=subprocess.PIPE, text=True)


def _read_until(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    assert any(word in line for line in process.stdout)


def test_down_leaves_nothing(bare: Layout) -> None:
    """Mounts, links, rules, routes, settings, cgroups and folders are after `down` what they were before `up`."""
    before = Host.now(bare)
    cluster = up(bare)
    _run_a_pod(cluster)
    during = Host.now(bare)
    assert during.mounts != before.mounts
    assert during.cgroups
    down(bare)
    assert Host.now(bare) == before


def test_down_cleans_up_after_programs_that_were_killed(bare: Layout) -> None:
    """With every program killed, pods still running, `down` leaves nothing either."""
    before = Host.now(bare)
    _run_a_pod(up(bare))
    for pid in alive(bare).values():
        os.kill(pid, signal.SIGKILL)
    assert running(bare) is None
    down(bare)
    assert Host.now(bare) == before


@pytest.mark.parametrize("after", ["configuration", "images", "API server", "node"])
def test_interrupted_up_leaves_nothing(bare: Layout, after: str) -> None:
    """An `up` that gets SIGTERM takes back what it had made by then."""
    before = Host.now(bare)
    with _up_command() as process:
        _read_until(process, after)
        process.terminate()
        assert process.wait(60) == 143
    assert Host.now(bare) == before


def test_killed_up_is_cleaned_up_by_the_next(bare: Layout) -> None:
    """What an `up` that was killed half way has left does not keep the next one from working."""
    with _up_command() as process:
        _read_until(process, "images")
        process.kill()
    assert running(bare) is None
    assert alive(bare)
    _run_a_pod(up(bare))


def test_status_tells_up_from_down_and_a_second_up_is_refused(bare: Layout) -> None:
    """`status` ends with 3 where there is no cluster and with 0 where there is; one that is up is not started over."""
    done = subprocess.run([*COMMAND, "status"], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (3, "down")
    up(bare)
    done = subprocess.run([*COMMAND, "status"], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "up")
    with pytest.raises(ClusterError, match="up already"):
        up(bare)
