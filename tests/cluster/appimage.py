"""A checkpoint-enabled image of the guide's sample server, packed from the tests' base root without a build tool."""

from __future__ import annotations

import functools
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from cluster.builder import Builder, plain_root
from cluster.kube import Cluster
from cluster.kube.images import pack
from cluster.kube.layout import CHECKOUT
from containers.layout import base_root

APPS = Path(__file__).with_name("apps")
PYTHON = Path(sys.prefix) / "share/chrek/criu"
NAME = "localhost/chrek-test-app"
PLAIN = "localhost/chrek-test-plain"
OTHER = "localhost/chrek-test-other"
AGENT = "localhost/chrek-agent:0.1.0"
COMMAND = ["/usr/local/bin/smart-entrypoint.sh", "python3", "/app/server.py"]


def _digest() -> str:
    found = hashlib.sha256(str(base_root()).encode())
    for folder in (CHECKOUT / "src/chrek", APPS, CHECKOUT / "deploy/image", PYTHON):
        for file in sorted(folder.rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                found.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return found.hexdigest()[:12]


@functools.cache
def app_image(cluster: Cluster) -> str:
    """Return the image's name; it is on the node."""
    return _on_node(cluster, NAME, bundle=True, command=COMMAND)


@functools.cache
def other_image(cluster: Cluster) -> str:
    """Return the name of an image with the same files and another digest; it is on the node."""
    return _on_node(cluster, OTHER, bundle=True, command=[*COMMAND, "--other"])


@functools.cache
def plain_image(cluster: Cluster) -> str:
    """Return the name of an image with the same server that knows nothing of ChReK; it is on the node."""
    return _on_node(cluster, PLAIN, bundle=False, command=["python3", "/app/server.py"])


@functools.cache
def agent_image(cluster: Cluster) -> str:
    """Return the name of the agent's own image, built from the Dockerfile; it is on the node."""
    builder = Builder(cluster)
    builder.make_debian()
    done = builder.build("--target", "agent", "--tag", AGENT)
    assert done.status == 0, done.output[-3000:]
    builder.load(AGENT)
    return AGENT


def _on_node(cluster: Cluster, name: str, *, bundle: bool, command: list[str]) -> str:
    tagged = f"{name}:{_digest()}"
    here = cluster.images()
    if tagged in here:
        return tagged
    for old in here:
        if old.startswith(f"{name}:"):
            cluster.remove_image(old)
    with plain_root() as root:
        if bundle:
            lay_out(root)
        shutil.copytree(APPS, root / "app", ignore=shutil.ignore_patterns("__pycache__"))
        archive = root.with_name("image.tar")
        pack(name=tagged, root=root, archive=archive, command=command)
        cluster.import_image(archive)
    return tagged


def lay_out(root: Path) -> None:
    """Put the bundle in, as the image's build does, with the base's own Python and shell."""
    home = root / "opt/chrek"
    (home / "bin").mkdir(parents=True)
    (home / "bin/python3").symlink_to("/usr/bin/python3")
    (home / "bin/sh").symlink_to("/bin/sh")
    shutil.copytree(CHECKOUT / "src/chrek", home / "lib/chrek", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(PYTHON, home / "criu", symlinks=True)
    for name in ("restore-entrypoint", "smart-entrypoint.sh"):
        shutil.copy(CHECKOUT / "deploy/image" / name, root / "usr/local/bin" / name)
        (root / "usr/local/bin" / name).chmod(0o755)
    subprocess.run(["chroot", str(root), "python3", "-m", "compileall", "-q", "/opt/chrek/lib"], check=True)
