"""Image archives made of a folder, with the standard library alone, and the two images every cluster has."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from .errors import ClusterError
from .layout import BUSYBOX_IMAGE, PAUSE_IMAGE, Layout

_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def pack(*, name: str, root: Path, archive: Path, command: list[str]) -> None:
    """Write `root` as a one-layer image in docker-archive form, which containerd and buildah read."""
    layer = _layer(root)
    digest = hashlib.sha256(layer).hexdigest()
    config = json.dumps(
        {
            "architecture": _ARCHITECTURES.get(platform.machine(), platform.machine()),
            "os": "linux",
            "created": "1970-01-01T00:00:00Z",
            "config": {"Cmd": command, "Env": [_PATH]},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
            # One entry for each layer, or buildah refuses to build on it.
            "history": [{"created": "1970-01-01T00:00:00Z", "created_by": "tests"}],
        }
    ).encode()
    config_name = f"{hashlib.sha256(config).hexdigest()}.json"
    layer_name = f"{digest}/layer.tar"
    manifest = json.dumps([{"Config": config_name, "RepoTags": [name], "Layers": [layer_name]}]).encode()
    unfinished = archive.with_suffix(".unfinished")
    with tarfile.open(unfinished, "w") as tar:
        for path, data in ((config_name, config), (layer_name, layer), ("manifest.json", manifest)):
            entry = tarfile.TarInfo(path)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    unfinished.rename(archive)


def make_basic(layout: Layout) -> None:
    """Make the pause image, which holds a pod's namespaces, and a busybox image for tests."""
    layout.images.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        pause = Path(temporary, "pause")
        pause.mkdir()
        shutil.copy(layout.binaries / "pause", pause)
        pack(name=PAUSE_IMAGE, root=pause, archive=layout.images / "pause.tar", command=["/pause"])
        busybox = Path(temporary, "busybox")
        _fill_busybox(busybox)
        pack(name=BUSYBOX_IMAGE, root=busybox, archive=layout.images / "busybox.tar", command=["sh"])


def _fill_busybox(root: Path) -> None:
    program = shutil.which("busybox")
    if program is None:
        message = "no busybox here; run `python3 -m tests.cluster.kube setup`"
        raise ClusterError(message)
    for folder in ("bin", "etc", "root", "proc", "sys", "dev", "tmp"):
        (root / folder).mkdir(parents=True)
    (root / "tmp").chmod(0o1777)
    shutil.copy(program, root / "bin" / "busybox")
    names = subprocess.run([program, "--list"], capture_output=True, text=True, check=True).stdout.split()
    for name in names:
        if name != "busybox":
            (root / "bin" / name).symlink_to("busybox")
    (root / "etc" / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n")
    (root / "etc" / "group").write_text("root:x:0:\nnogroup:x:65534:\n")


def _layer(root: Path) -> bytes:
    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = entry.mtime = 0
        entry.uname = entry.gname = "root"
        return entry

    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        tar.add(root, arcname=".", filter=plain)
    return data.getvalue()
