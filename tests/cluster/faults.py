"""Makes what is wrong outside a pod's manifest: a store that is full or read-only, checkpoints that do not fit or are broken."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from chrek.artifact import Gpu, Manifest
from chrek.artifact import manifest as manifests
from chrek.artifact import marker as markers
from cluster.situations import Fault
from gpu import cudastandin

DRIVER = "580.159.04"
"""The version that the stand-in of NVIDIA's libraries gives."""
SIZE = "640m"
"""Of the store: a dozen checkpoints of the tests' server."""


@contextlib.contextmanager
def mounted_store(folder: Path) -> Iterator[Path]:
    """A store that is a file system of its own, so that it can be filled and made read-only."""
    store = folder / "store"
    store.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE},mode=700", "tmpfs", str(store)], check=True)
    try:
        yield store
    finally:
        subprocess.run(["umount", "-l", str(store)], check=True)


def no_stand_in() -> str:
    """Why there is no stand-in of NVIDIA's libraries here; empty: there is one."""
    if Path("/dev/nvidiactl").exists():
        return "this machine has a driver of its own"
    return "" if cudastandin.compiler() else "needs a C compiler for the stand-in driver"


@contextlib.contextmanager
def stand_in_driver(folder: Path) -> Iterator[None]:
    """Let programs that are started now find NVIDIA's libraries, with one GPU; a machine that has a driver keeps it."""
    if no_stand_in():
        yield
        return
    standin = cudastandin.StandIn(folder, cudastandin.build(folder), gpus=1)
    for name in ("libcuda.so.1", "libnvidia-ml.so.1"):
        (folder / name).symlink_to(standin.library)
    os.environ["LD_LIBRARY_PATH"] = str(folder)
    try:
        yield
    finally:
        del os.environ["LD_LIBRARY_PATH"], os.environ["CHREK_STANDIN"]


@contextlib.contextmanager
def made(fault: Fault, store: Path, checkpoint_id: str) -> Iterator[None]:
    """Make a fault of the store, or of a copy of checkpoint ``one`` under another id, as long as the context lasts."""
    if fault is Fault.FULL:
        with _full(store):
            yield
    elif fault is Fault.READ_ONLY:
        _remount(store, "ro")
        try:
            yield
        finally:
            _remount(store, "rw")
    elif fault in _EDITS or fault in _DAMAGES:
        copy_checkpoint(store, checkpoint_id, _EDITS.get(fault, lambda manifest: manifest))
        try:
            if fault in _DAMAGES:
                _DAMAGES[fault](store / checkpoint_id)
            yield
        finally:
            shutil.rmtree(store / checkpoint_id)
    else:
        yield


def copy_checkpoint(store: Path, checkpoint_id: str, edit: Callable[[Manifest], Manifest]) -> None:
    """Copy checkpoint ``one`` under another id with other facts; digests and seal fit."""
    target = store / checkpoint_id
    shutil.copytree((store / "one").resolve(), target, symlinks=True)
    manifest = manifests.read_manifest((target / manifests.FILE_NAME).read_bytes())
    text = edit(replace(manifest, checkpoint_id=checkpoint_id)).to_json()
    _seal(target, text, checkpoint_id)


def _seal(target: Path, text: bytes, checkpoint_id: str) -> None:
    marker = markers.read_marker((target / markers.FILE_NAME).read_bytes())
    marker = replace(marker, checkpoint_id=checkpoint_id, manifest_sha256=manifests.manifest_digest(text))
    (target / manifests.FILE_NAME).write_bytes(text)
    (target / markers.FILE_NAME).write_bytes(marker.to_sealed_json())


def _gpus(manifest: Manifest) -> Manifest:
    two = tuple(
        Gpu(uuid=f"GPU-{number:08x}-0000-0000-0000-000000000000", model="NVIDIA H100 80GB HBM3", driver=DRIVER)
        for number in (1, 2)
    )
    return replace(manifest, facts=replace(manifest.facts, gpus=two))


def _processor(manifest: Manifest) -> Manifest:
    return replace(manifest, facts=replace(manifest.facts, cpu_features=(*manifest.facts.cpu_features, "zz_quantum")))


def _machine(manifest: Manifest) -> Manifest:
    return replace(manifest, facts=replace(manifest.facts, architecture="riscv64"))


def _tenant(manifest: Manifest) -> Manifest:
    return replace(manifest, provenance=replace(manifest.provenance, namespace="somebody-else"))


def _damage(target: Path) -> None:
    shard = target / "memory" / "shard-00"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 0xFF
    shard.write_bytes(data)


def _change(target: Path) -> None:
    path = target / manifests.FILE_NAME
    path.write_bytes(path.read_bytes().replace(b'"frozen_seconds"', b'"frozen_secondz"', 1))


def _newer(target: Path) -> None:
    text = (target / manifests.FILE_NAME).read_bytes()
    written = json.loads(text)["format_version"]
    newer = text.replace(f'"format_version": {written}'.encode(), f'"format_version": {written + 97}'.encode(), 1)
    newer = newer.replace(f'"format_version":{written}'.encode(), f'"format_version":{written + 97}'.encode(), 1)
    assert newer != text
    _seal(target, newer, target.name)


_EDITS: Mapping[Fault, Callable[[Manifest], Manifest]] = {
    Fault.GPUS: _gpus,
    Fault.PROCESSOR: _processor,
    Fault.MACHINE: _machine,
    Fault.TENANT: _tenant,
}
_DAMAGES: Mapping[Fault, Callable[[Path], None]] = {
    Fault.DAMAGED: _damage,
    Fault.CHANGED: _change,
    Fault.NEWER: _newer,
}


@contextlib.contextmanager
def _full(store: Path) -> Iterator[None]:
    _remount(store, f"size={shutil.disk_usage(store).used}")
    try:
        yield
    finally:
        _remount(store, f"size={SIZE}")


def _remount(store: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(store)], check=True)
