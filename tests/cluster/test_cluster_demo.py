"""`make cluster-demo`: the demo's own parts, run on the session's cluster, and what its wrapper says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.kube import Cluster
from cluster.kube.layout import CHECKOUT

DEMO = CHECKOUT / "examples/demo"
sys.path.append(str(DEMO))

import cluster_demo  # noqa: E402
from cluster_images import make_images  # noqa: E402
from cluster_place import installed  # noqa: E402

LAST = r"cluster-demo: cold [\d.]+ s, checkpoint [\d.]+ s \(frozen [\d.]+ s\), restore [\d.]+ s, answers identical"


def test_demo(cluster: Cluster) -> None:
    """A real server starts cold, is checkpointed by the example's Job, and restored gives the same answer."""
    images = make_images(cluster, print)
    name = f"cluster-demo-{os.getpid()}"
    with installed(cluster, name) as workspace:
        run = cluster_demo.demo(workspace, images)
    assert run.cold.how.startswith("cold/NOT_FOUND "), run
    assert run.restored.how.startswith("restored "), run
    assert re.fullmatch(LAST, run.sentence())
    assert "Harbour Bakery" in cluster_demo.words(run.restored.lines)
    # Each clock begins later than the one before.
    assert run.restored.from_pod >= run.restored.from_container >= run.engine > 0
    left = cluster.kubectl("get", "persistentvolumes,namespaces", "--output=name").split()
    assert f"persistentvolume/{name}" not in left
    assert not list((CHECKOUT / ".cache/demo").glob(f"store-{os.getpid()}-cluster"))


def test_it_says_what_it_does_before_it_does_it() -> None:
    """Without root the wrapper says what it would do, download and need, and does nothing."""
    argv = ["setpriv", "--reuid", "65534", "--clear-groups", str(DEMO / "run-cluster")]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    if "Permission denied" in done.stderr:
        pytest.skip("needs a checkout that other users may read")
    assert done.returncode == 1
    for word in ("does", "downloads", "keeps", "needs"):
        assert f"\n  {word} " in done.stdout
    assert "need root" in done.stderr


def test_without_debian_it_says_so(tmp_path: Path) -> None:
    """Where there is no apt-get the wrapper names it, and does nothing."""
    for program in ("bash", "uname", "id", "dirname", "cat"):
        (tmp_path / program).symlink_to(f"/usr/bin/{program}")
    argv = ["/bin/bash", str(DEMO / "run-cluster")]
    done = subprocess.run(argv, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, "no apt-get" in done.stderr) == (1, os.geteuid() == 0)
