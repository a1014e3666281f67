"""The manifest: what a checkpoint is, what it needs, and a digest of every file in it.

The classes below are the schema; ``docs/format.md`` is the same in words, for readers in other
languages. A section decorated with `open_section` only informs people, so newer writers may add to it;
in all others an unknown key is something that a restore would have to obey, and is refused.
Anything that changes what a correct reader must do raises `FORMAT_VERSION`.

To record a new fact: add a field (with a default, or old checkpoints cannot be read), a row in
``docs/format.md``, and let the engine fill it in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from chrek.artifact import strictjson
from chrek.artifact.codec import decode, encode, open_section
from chrek.artifact.digest import FileEntry
from chrek.artifact.names import check_file_path, is_checkpoint_id, unix_time
from chrek.artifact.written import FORMAT_VERSION, WRITTEN
from chrek.errors import Reason, Refused
from chrek.system.ids import NsPid

FILE_NAME: Final = "manifest.json"
MAX_BYTES: Final = strictjson.MAX_BYTES


@open_section
@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a checkpoint came from; times in seconds."""

    command: tuple[str, ...]
    host: str
    kernel: str
    criu: str
    chrek: str
    image: str | None = None
    build_id: str | None = None
    namespace: str | None = None
    service_account: str | None = None
    phases: Mapping[str, float] = field(default_factory=dict)
    frozen_seconds: float = 0.0
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU that the application used: all of its memory and what was used of it, in bytes, and its device minor."""

    uuid: str
    model: str
    driver: str
    memory: int = 0
    used: int = 0
    minor: int = 0


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a machine must have for a restore; checked before anything is applied."""

    architecture: str
    cpu_features: tuple[str, ...] = ()
    memory_bytes: int = 0
    gpus: tuple[Gpu, ...] | None = None


@open_section
@dataclass(frozen=True, kw_only=True)
class Process:
    """One process of the tree, as people want to see it; ids are the container's."""

    pid: NsPid
    ppid: NsPid
    command: tuple[str, ...]
    threads: int = 1
    memory_bytes: int = 0
    uid: int = 0
    gid: int = 0


@dataclass(frozen=True, kw_only=True)
class Stream:
    """A standard stream of the container: its target as in /proc/PID/fd, and how it is open.

    *key* is CRIU's name for it when it comes from outside the container and a restore must replace it.
    """

    target: str
    mode: Literal["r", "w", "rw"]
    key: str | None = None


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The root process's environment without its values, which may be secrets.

    *sha256* is that of the NUL-terminated ``NAME=value`` strings, sorted by their bytes.
    """

    names: tuple[str, ...]
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Application:
    """The captured process tree."""

    root_pid: NsPid
    processes: tuple[Process, ...]
    standard_streams: Mapping[str, Stream] = field(default_factory=dict)
    ready_file: str | None = None
    signal_file: str | None = None
    marker_file: str | None = None
    environment: Environment | None = None
    gpu_processes: tuple[NsPid, ...] = ()


@dataclass(frozen=True, kw_only=True)
class OpenFile:
    """A file outside the checkpoint that is open or mapped: it must be there again, unchanged."""

    path: str
    mount: str
    size: int
    build_id: str | None = None
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Volume:
    """A volume whose contents are in *archive*, a file of the checkpoint."""

    path: str
    kind: str
    archive: str


@dataclass(frozen=True, kw_only=True)
class SideFile:
    """A file that CRIU needs at *path* in the container, kept as *file* in the checkpoint."""

    path: str
    file: str
    mode: int = 0o600
    uid: int = 0
    gid: int = 0


@dataclass(frozen=True, kw_only=True)
class Memory:
    """How memory was stored; sizes in bytes."""

    mode: Literal["lazy", "plain"]
    bytes: int = 0
    stored_bytes: int = 0
    zero_bytes: int = 0
    shards: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything said about one checkpoint; *files* has all its files but the manifest and the marker."""

    checkpoint_id: str
    created: str
    provenance: Provenance
    facts: Facts
    application: Application
    memory: Memory
    files: Mapping[str, FileEntry]
    open_files: tuple[OpenFile, ...] = ()
    volumes: tuple[Volume, ...] = ()
    side_files: tuple[SideFile, ...] = ()
    format_version: int = WRITTEN

    def __post_init__(self) -> None:
        if not is_checkpoint_id(self.checkpoint_id):
            raise ValueError(f"{self.checkpoint_id[:80]!r} is not a checkpoint id")
        unix_time(self.created)
        _check_paths(self.files)
        needed = [*self.memory.shards, *(volume.archive for volume in self.volumes)]
        needed += [side.file for side in self.side_files]
        for path in needed:
            if path not in self.files:
                raise ValueError(f"{path[:80]!r} is used but not among the files")

    @property
    def stored_bytes(self) -> int:
        """Bytes of all files, without the manifest and the marker."""
        return sum(entry.size for entry in self.files.values())

    def to_json(self) -> bytes:
        """Return the text of ``manifest.json``.

        Raises:
            Refused: ``CORRUPT``: no reader would accept it (too many files, for example).
        """
        members = encode(self)
        # The version comes first, for people who look at the file with head.
        text = strictjson.render({"format_version": members.pop("format_version"), **members})
        read_manifest(text)
        return text


def read_manifest(text: bytes, *, document: str = FILE_NAME) -> Manifest:
    """Read a manifest; its format version is looked at before anything else.

    Raises:
        Refused: ``FORMAT_TOO_NEW`` or ``CORRUPT``.
    """
    value = strictjson.parse(text, document=document)
    version = value.get("format_version") if isinstance(value, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise Refused(Reason.CORRUPT, f"{document} has no format_version.")
    if version > FORMAT_VERSION:
        raise Refused(
            Reason.FORMAT_TOO_NEW,
            f"{document} is of format version {version}; this ChReK reads versions up to {FORMAT_VERSION}.",
        )
    return decode(Manifest, value, document=document)


def manifest_digest(text: bytes) -> str:
    """Return what ``checkpoint.done`` says of a manifest with this text."""
    return hashlib.sha256(text).hexdigest()


def _check_paths(files: Mapping[str, FileEntry]) -> None:
    for path in files:
        check_file_path(path)
        if path in {FILE_NAME, "checkpoint.done"}:
            raise ValueError(f"{path!r} cannot have a digest inside the manifest")
        parts = path.split("/")
        for depth in range(1, len(parts)):
            if "/".join(parts[:depth]) in files:
                raise ValueError(f"{path[:80]!r} is below a file")
