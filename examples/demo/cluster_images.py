"""The images of the demo on Kubernetes: the agent's, and the demo's server made checkpoint-enabled; brought to the node.

Both are built by buildah as anybody would build them: the agent from the project's Dockerfile, the server from
``Dockerfile`` here and then by ``deploy/checkpoint-enable``. Only the base image is the machine's own: the small Debian
with Python that ``tools/setup test`` has unpacked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.appimage import AGENT
from cluster.builder import Builder, Result
from cluster.kube import Cluster, ClusterError
from cluster.kube.layout import CHECKOUT
from containers import base_root
from layer import image_layers

HERE = Path(__file__).resolve().parent
BASE = "localhost/chrek-demo-base"
SERVER = "localhost/chrek-demo:1"
ENABLED = "localhost/chrek-demo"


@dataclass(frozen=True)
class Images:
    """The names of both images; they are on the node."""

    agent: str
    server: str


def make_images(cluster: Cluster, say: Callable[[str], None]) -> Images:
    """Build both images, or take what the last run has built, and load them into the node.

    Raises:
        ClusterError: a build failed; the message has the end of what it said.
    """
    builder = Builder(cluster)
    say("image of the agent: `buildah bud --target agent`")
    builder.make_debian()
    _check(builder.build("--target", "agent", "--tag", AGENT))
    _, layer = image_layers()
    say("image of the demo's server: `buildah bud examples/demo`")
    _check(
        builder.build(
            f"--file={HERE / 'Dockerfile'}",
            f"--build-context=packages={layer}",
            f"--build-context=workload={CHECKOUT / 'src/chrek/workload'}",
            f"--build-arg=BASE_IMAGE={_base(builder)}",
            f"--tag={SERVER}",
            context=HERE / "image",
        )
    )
    enabled = f"{ENABLED}:checkpoint-enabled"
    say(f"deploy/checkpoint-enable {SERVER} {enabled}")
    _check(builder.checkpoint_enable(SERVER, enabled))
    # Named by its content, so that an image that is on the node already is not carried there again.
    server = f"{ENABLED}:{_id(builder, enabled)}"
    builder.run("tag", enabled, server)
    say("both images to the node")
    builder.load(AGENT)
    here = cluster.images()
    if server not in here:
        for old in here:
            if old.startswith(f"{ENABLED}:"):
                cluster.remove_image(old)
        builder.load(server)
    builder.run("rmi", server)
    return Images(AGENT, server)


def _base(builder: Builder) -> str:
    """Return the base image's name, which says what it was made from; it is made where it is missing."""
    name = f"{BASE}:{base_root().name.removeprefix('rootfs-')}"
    if name not in builder.run("images", "--format", "{{.Name}}:{{.Tag}}").split():
        builder.make_plain(name, command=["python3"])
    return name


def _id(builder: Builder, image: str) -> str:
    return builder.run("images", "--quiet", "--no-trunc", image).strip().removeprefix("sha256:")[:12]


def _check(done: Result) -> None:
    if done.status:
        raise ClusterError(f"a build of an image failed:\n{done.output.strip()[-3000:]}")
