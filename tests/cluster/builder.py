"""Builds images with buildah, its storage in ``.cache``, on a Debian image made on the spot from packages."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.kube import Cluster
from cluster.kube.images import pack
from cluster.kube.layout import CHECKOUT
from containers.layout import base_root

DEBIAN_IMAGE = "localhost/debian:trixie"
CONTEXT = CHECKOUT / "deploy" / "chrek"


@contextlib.contextmanager
def plain_root() -> Iterator[Path]:
    """A copy of the tests' base root with nothing of ChReK in it; there is room beside it for an archive."""
    # Beside the base, on one file system: unchanged files are hard links.
    with tempfile.TemporaryDirectory(dir=CHECKOUT / ".cache") as temporary:
        root = Path(temporary, "root")
        subprocess.run(["cp", "-al", str(base_root()), str(root)], check=True)
        shutil.rmtree(root / "opt/chrek")
        for program in (root / "usr/local/bin").iterdir():
            program.unlink()
        yield root


@dataclass(frozen=True)
class Result:
    """How a build ended, and all it said."""

    status: int
    output: str


@dataclass(frozen=True)
class Builder:
    """buildah, and the way of its images into the cluster."""

    cluster: Cluster

    @property
    def _storage(self) -> Path:
        return self.cluster.layout.cache / "buildah"

    @property
    def command(self) -> list[str]:
        """Buildah with its storage."""
        return ["buildah", "--root", str(self._storage / "root"), "--runroot", str(self._storage / "run")]

    @property
    def environment(self) -> dict[str, str]:
        """Chroot isolation: no network set-up of its own that stays behind."""
        return os.environ | {"BUILDAH_ISOLATION": "chroot", "STORAGE_DRIVER": "overlay"}

    @property
    def build_options(self) -> list[str]:
        """What a build needs here: our Debian image, layers kept, this machine's certificates and network."""
        options = ["--pull-never", "--layers", "--network=host", f"--build-arg=DEBIAN_IMAGE={DEBIAN_IMAGE}"]
        return [*options, "--volume=/etc/ssl/certs:/etc/ssl/certs:ro"]

    def run(self, *arguments: str) -> str:
        """Run buildah; gives its output."""
        done = subprocess.run(
            [*self.command, *arguments], env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    def build(self, *options: str, context: Path = CONTEXT) -> Result:
        """Run a build from a context, which is where the shell would stand."""
        done = subprocess.run(
            [*self.command, "bud", *self.build_options, *options, "."],
            cwd=context,
            env=self.environment | {"PWD": str(context)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return Result(done.returncode, done.stdout)

    def checkpoint_enable(self, image: str, output: str) -> Result:
        """Run deploy/checkpoint-enable, as a person would."""
        done = subprocess.run(
            [CHECKOUT / "deploy" / "checkpoint-enable", image, output, *self.build_options],
            env=self.environment | {"CHREK_BUILDER": " ".join(self.command)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return Result(done.returncode, done.stdout)

    def config(self, image: str) -> dict[str, Any]:
        """An image's OCI configuration."""
        found: dict[str, Any] = json.loads(self.run("inspect", "--type", "image", image))["OCIv1"]["config"]
        return found

    def load(self, image: str) -> None:
        """Bring an image into the cluster."""
        archive = self._storage / "load.tar"
        archive.unlink(missing_ok=True)
        try:
            self.run("push", "--quiet", image, f"docker-archive:{archive}:{image}")
            self.cluster.import_image(archive)
        finally:
            archive.unlink(missing_ok=True)

    def pull_archive(self, archive: Path) -> None:
        """Bring an image archive into buildah."""
        self.run("pull", "--quiet", f"docker-archive:{archive}")

    def make_plain(self, name: str, *, command: list[str], app: Path | None = None) -> None:
        """Make an image of the tests' base root, Debian with Python, with nothing of ChReK; `app` becomes its /app."""
        with plain_root() as root:
            if app is not None:
                shutil.copytree(app, root / "app", ignore=shutil.ignore_patterns("__pycache__"))
            archive = root.with_name("image.tar")
            pack(name=name, root=root, archive=archive, command=command)
            self.pull_archive(archive)

    def make_debian(self) -> None:
        """Make the Debian image once; half a minute."""
        archive = self.cluster.layout.cache / "debian-trixie.tar"
        if not archive.exists():
            root = self.cluster.layout.cache / "debian-trixie"
            shutil.rmtree(root, ignore_errors=True)
            done = subprocess.run(
                ["debootstrap", "--variant=minbase", "--include=ca-certificates", "trixie", str(root)],
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stdout[-2000:]
            for folder in ("var/cache/apt/archives", "var/lib/apt/lists", "usr/share/doc", "usr/share/locale"):
                shutil.rmtree(root / folder, ignore_errors=True)
            (root / "var/cache/apt/archives/partial").mkdir(parents=True)
            pack(name=DEBIAN_IMAGE, root=root, archive=archive, command=["bash"])
            shutil.rmtree(root)
        self.pull_archive(archive)
