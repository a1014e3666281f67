"""A small, complete checkpoint, and the ways in which tests look at a store."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from chrek.artifact import (
    Application,
    BlocksBuilder,
    Environment,
    Facts,
    FileEntry,
    Manifest,
    Memory,
    OpenFile,
    Process,
    Provenance,
    SideFile,
    Stream,
    Volume,
    timestamp,
)
from chrek.errors import Reason, Refused
from chrek.store import Published, Staging, Store, open_checkpoint, write_file
from chrek.system.ids import NsPid

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

# Bulk data large enough for blocks in a small manifest would make every test slow; entries with
# blocks are made with the smallest block size instead.
CONTENTS: dict[str, bytes] = {
    "dump.log": b"(00.000001) dumped\n",
    "images/core-7.img": bytes(range(256)) * 3,
    "images/empty.img": b"",
    "memory/shard-0": bytes(range(251)) * 700,
    "side/link_remap.1": b"side",
    "volumes/0.tar": b"archive" * 100,
}
BULK = "memory/shard-0"


def make_manifest(checkpoint_id: str, files: Mapping[str, FileEntry], *, created: float = 1_800_000_000.0) -> Manifest:
    """Return a manifest that uses every section."""
    shards = tuple(path for path in files if path.startswith("memory/"))
    return Manifest(
        checkpoint_id=checkpoint_id,
        created=timestamp(created),
        provenance=Provenance(
            command=("python3", "-m", "server", "\udcff"),
            host="node-1",
            kernel="6.12.1",
            criu="4.2.1",
            chrek="0.1.0",
            phases={"dump": 0.25},
            frozen_seconds=0.5,
            warnings=("a warning",),
        ),
        facts=Facts(architecture="x86_64", cpu_features=("avx2", "fma"), memory_bytes=1 << 20),
        application=Application(
            root_pid=NsPid(7),
            processes=(Process(pid=NsPid(7), ppid=NsPid(1), command=("python3",), threads=3, memory_bytes=1 << 20),),
            standard_streams={"1": Stream(target="pipe:[4711]", mode="w")},
            ready_file="/tmp/ready",
            environment=Environment(names=("HOME", "PATH"), sha256="0" * 64),
        ),
        memory=Memory(mode="lazy", bytes=1 << 20, stored_bytes=1 << 19, zero_bytes=1 << 19, shards=shards),
        files=files,
        open_files=(OpenFile(path="/usr/bin/python3", mount="/", size=6_000_000, build_id="ab12"),),
        volumes=tuple(Volume(path="/cache", kind="emptyDir", archive=path) for path in files if "volumes/" in path),
        side_files=tuple(SideFile(path="/dev/shm/link_remap.1", file=path) for path in files if "side/" in path),
    )


def fill(staging: Staging, contents: Mapping[str, bytes]) -> dict[str, FileEntry]:
    """Write *contents* and return their digests."""
    for path, data in contents.items():
        parent, _, name = path.rpartition("/")
        directory = staging.make_directory(parent) if parent else os.dup(staging.fd)
        try:
            write_file(directory, name, data)
        finally:
            os.close(directory)
    known = {path: bulk_entry(data) for path, data in contents.items() if path.startswith("memory/")}
    return staging.digest(known=known, workers=2)


def bulk_entry(data: bytes) -> FileEntry:
    """Return the entry of *data* in blocks of the smallest size."""
    builder = BlocksBuilder(block_size=64 << 10)
    for index, start in enumerate(range(0, len(data), builder.block_size)):
        builder.add(index, data[start : start + builder.block_size])
    return FileEntry.of_blocks(builder.finish())


def publish(
    store: Store, checkpoint_id: str, contents: Mapping[str, bytes] | None = None, *, created: float = 1_800_000_000.0
) -> Published:
    """Publish a checkpoint with *contents* (default `CONTENTS`)."""
    with Staging.create(store, checkpoint_id) as staging:
        files = fill(staging, CONTENTS if contents is None else contents)
        return staging.publish(make_manifest(checkpoint_id, files, created=created), extra={"pod_uid": "uid-1"})


def read_all(store: Store, checkpoint_id: str) -> dict[str, bytes]:
    """Open, verify and return the contents of every file."""
    with open_checkpoint(store, checkpoint_id) as checkpoint:
        checkpoint.verify().require_ok(checkpoint_id)
        return {path: checkpoint.read(path) for path in checkpoint.manifest.files}


def read_or_none(store: Store, checkpoint_id: str) -> dict[str, bytes] | None:
    """`read_all`, or None if there is no such checkpoint; a damaged one still raises."""
    try:
        return read_all(store, checkpoint_id)
    except Refused as error:
        if error.reason is Reason.NOT_FOUND:
            return None
        raise


def tree_of(path: Path) -> dict[str, str]:
    """Return every name below *path* with its type and, for links, target: what a test compares."""
    found = {}
    for entry in sorted(path.rglob("*")):
        kind = "link " + os.readlink(entry) if entry.is_symlink() else "dir" if entry.is_dir() else "file"
        found[str(entry.relative_to(path))] = kind
    return found
