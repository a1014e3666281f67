"""Builds the cluster's programs from Go modules, once for each version of their sources.

The result lies in ``.cache/cluster/bin`` beside a key made from every file that went in and from the Go
version; where the key is unchanged, nothing is done. Go's own caches lie there too, so that a changed
source costs a link (seconds) and not a full compile (minutes).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from . import images
from .errors import ClusterError

if TYPE_CHECKING:
    from collections.abc import Callable

    from .layout import Layout

SOURCES = Path(__file__).parent / "go"
_CONTAINERD = "github.com/containerd/containerd/v2"
_VERSION = "k8s.io/component-base/version"
_RESULTS = ("kubeone", "pause", "containerd", "containerd-shim-runc-v2", "ctr")


def is_current(layout: Layout) -> bool:
    """Whether the programs exist and were built from the sources as they are now."""
    marker = layout.binaries / "key"
    complete = all((layout.binaries / name).exists() for name in _RESULTS)
    return complete and marker.exists() and marker.read_text() == _key()


def build(layout: Layout, say: Callable[[str], None]) -> None:
    """Compile what is not there yet: about 6 minutes on 2 cores from nothing, nothing when it is current.

    Raises:
        ClusterError: a compiler failed; the message has the end of its output.
    """
    if is_current(layout):
        return
    layout.binaries.mkdir(parents=True, exist_ok=True)
    (layout.binaries / "key").unlink(missing_ok=True)
    kubernetes = _required(SOURCES / "kubeone" / "go.mod", "k8s.io/kubernetes")
    containerd = _required(SOURCES / "containerd" / "go.mod", _CONTAINERD)
    say(f"compiling Kubernetes {kubernetes} (minutes, the first time)")
    major, minor, _ = kubernetes.removeprefix("v").split(".")
    stamp = {"gitVersion": kubernetes, "gitMajor": major, "gitMinor": minor, "gitTreeState": "clean"}
    flags = " ".join(f"-X {_VERSION}.{name}={value}" for name, value in stamp.items())
    _go(layout, "kubeone", f"-s -w {flags}", "-tags=grpcnotrace", "-o", f"{layout.kubeone}", ".")
    _go(layout, "kubeone", "-s -w", "-o", f"{layout.binaries / 'pause'}", "./pause")
    say(f"compiling containerd {containerd}")
    commands = [f"{_CONTAINERD}/cmd/{name}" for name in ("containerd", "containerd-shim-runc-v2", "ctr")]
    stamp_containerd = f"-s -w -X {_CONTAINERD}/version.Version={containerd}"
    tags = "-tags=no_btrfs,no_devmapper,no_zfs"
    _go(layout, "containerd", stamp_containerd, tags, "-o", f"{layout.binaries}/", *commands)
    for name in ("kubectl", "helm"):
        (layout.binaries / name).unlink(missing_ok=True)
        (layout.binaries / name).symlink_to("kubeone")
    images.make_basic(layout)
    (layout.binaries / "key").write_text(_key())


def _key() -> str:
    digest = hashlib.sha256()
    for path in sorted([*SOURCES.rglob("*"), Path(__file__), Path(images.__file__)]):
        if path.is_file():
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _go(layout: Layout, module: str, linker: str, *arguments: str) -> None:
    environment = os.environ | {
        "CGO_ENABLED": "0",
        "GOMODCACHE": str(layout.cache / "gomod"),
        "GOCACHE": str(layout.cache / "gocache"),
        # Modules are writable, so that removing .cache needs no chmod.
        "GOFLAGS": "-buildvcs=false -modcacherw",
        "GOWORK": "off",
    }
    nice = ["nice"] if shutil.which("nice") else []
    done = subprocess.run(
        [*nice, "go", "build", "-trimpath", f"-ldflags={linker}", *arguments],
        cwd=SOURCES / module,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        message = f"`go build` of {module} failed:\n{done.stderr.strip()[-2000:]}"
        raise ClusterError(message)


def _required(modfile: Path, module: str) -> str:
    for line in modfile.read_text().splitlines():
        words = line.removeprefix("require").split()
        if words[:1] == [module]:
            return words[1]
    message = f"{modfile} does not require {module}"
    raise ClusterError(message)
