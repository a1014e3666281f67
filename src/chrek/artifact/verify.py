"""Comparison of a checkpoint's directory with its manifest, on all cores, to the end.

Every difference is reported, not only the first: whoever looks at a damaged store wants to know how
much is damaged. Work is cut into pieces of the files' blocks, so that one large shard keeps all threads busy
and none of them holds more than one read buffer.
"""

from __future__ import annotations

import random
import re
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final, Protocol

from chrek.artifact import manifest as manifests
from chrek.artifact import marker as markers
from chrek.artifact import tree
from chrek.artifact.digest import Algorithm, FileEntry, hash_extent
from chrek.errors import Reason, Refused

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

_PIECE: Final = 32 << 20  # bytes of one file that a thread takes at once
_SAMPLE: Final = 16  # one block in this many is read for a sampled check
_BUFFER: Final = 1 << 20
_SHOWN: Final = 5
# Blobs of pools are named by their contents and may be shared by checkpoints of the same weights.
_POOL_BLOB: Final = re.compile(r"gpu/[^/]+/blobs/[0-9a-f]{64}")


def is_pool_blob(path: str) -> bool:
    """Return whether a file holds GPU memory of a pool: it may have several names, and the pool itself compares it."""
    return _POOL_BLOB.fullmatch(path) is not None


class Level(Enum):
    """How much bulk data a verification reads."""

    FULL = "full"
    SAMPLED = "sampled"
    OFF = "off"


class Progress(Protocol):
    """Told how far a long piece of work has come."""

    def __call__(self, done: int, total: int) -> None:
        """Take the bytes done and the bytes to do."""


@dataclass(frozen=True, order=True)
class Problem:
    """One difference: which file, and what is wrong with it."""

    path: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}: {self.text}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """The outcome of a verification."""

    level: Level
    problems: tuple[Problem, ...]
    files: int
    bytes_read: int
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether nothing differs."""
        return not self.problems

    def require_ok(self, checkpoint_id: str) -> None:
        """Raise if something differs.

        Raises:
            Refused: ``CORRUPT``, with the first problems in its message.
        """
        if self.problems:
            shown = "; ".join(map(str, self.problems[:_SHOWN]))
            more = len(self.problems) - _SHOWN
            rest = f"; and {more} more" if more > 0 else ""
            raise Refused(Reason.CORRUPT, f"checkpoint {checkpoint_id} is damaged: {shown}{rest}.")


@dataclass(frozen=True)
class _Piece:
    path: str
    entry: FileEntry
    blocks: tuple[int, ...]
    length: int


def verify_files(
    fd: int,
    files: Mapping[str, FileEntry],
    *,
    level: Level,
    workers: int,
    unread: Collection[str] = (),
    progress: Progress | None = None,
) -> Report:
    """Compare the directory *fd* with *files*; see `Checkpoint.verify`."""
    begin = time.monotonic()
    problems, sound = _compare_tree(fd, files)
    pieces = [piece for path in sound if path not in unread for piece in _pieces(path, files[path], level)]
    meter = _Meter(sum(piece.length for piece in pieces), progress)
    with ThreadPoolExecutor(max(1, min(workers, len(pieces)))) as pool:
        damaged = {path: text for path, text in pool.map(lambda piece: _check(fd, piece, meter), pieces) if text}
    problems += [Problem(path, text) for path, text in damaged.items()]
    return Report(
        level=level,
        problems=tuple(sorted(problems)),
        files=len(files),
        bytes_read=meter.done,
        seconds=time.monotonic() - begin,
    )


class _Meter:
    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total = total
        self.done = 0
        self._progress = progress
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self.done += count
            if self._progress is not None:
                self._progress(self.done, self.total)


def _compare_tree(fd: int, files: Mapping[str, FileEntry]) -> tuple[list[Problem], list[str]]:
    """Return what is wrong without reading contents, and the files whose contents are worth reading."""
    directories = {path[:cut] for path in files for cut in range(len(path)) if path[cut] == "/"}
    unseen = dict(files)
    problems: list[Problem] = []
    sound: list[str] = []
    try:
        for found in tree.scan(fd):
            entry = unseen.pop(found.path, None)
            text = _compare(found, entry, known_directory=found.path in directories)
            if text is not None:
                problems.append(Problem(found.path, text))
            elif entry is not None:
                sound.append(found.path)
    except (OSError, ValueError) as error:
        problems.append(Problem(".", f"the directory cannot be read to the end: {error}"))
    problems += [Problem(path, "is missing") for path in unseen]
    return problems, sound


def _compare(found: tree.Entry, entry: FileEntry | None, *, known_directory: bool) -> str | None:
    if found.is_directory and known_directory:
        return None
    own = found.path in {manifests.FILE_NAME, markers.FILE_NAME}
    if entry is None and not own:
        return f"a {found.kind} that is not in the manifest"
    if not stat.S_ISREG(found.status.st_mode):
        return f"is a {found.kind}, not a regular file"
    if found.status.st_nlink > 1 and not is_pool_blob(found.path):
        return f"has {found.status.st_nlink} hard links instead of one"
    if entry is not None and found.status.st_size != entry.size:
        return f"has {found.status.st_size} bytes instead of {entry.size}"
    return None


def _pieces(path: str, entry: FileEntry, level: Level) -> Iterator[_Piece]:
    bulk = entry.bulk
    if bulk is None:
        yield _Piece(path, entry, (), entry.size)
        return
    chosen = _choose(bulk.count, level)
    step = max(1, _PIECE // bulk.block_size)
    for start in range(0, len(chosen), step):
        blocks = tuple(chosen[start : start + step])
        yield _Piece(path, entry, blocks, sum(bulk.extent(index)[1] for index in blocks))


def _choose(count: int, level: Level) -> range | list[int]:
    if level is Level.FULL:
        return range(count)
    if level is Level.OFF:
        return range(0)
    # Another sample each time: damage that one restore does not see, the next one may. The ends are always
    # looked at, because a copy that was cut off and then extended is wrong there.
    ends = {0, count - 1} if count else set()
    return sorted(ends | set(random.SystemRandom().sample(range(count), count // _SAMPLE)))


def _check(fd: int, piece: _Piece, meter: _Meter) -> tuple[str, str | None]:
    try:
        with tree.opened_file(fd, piece.path) as file:
            text = _check_contents(file, piece, meter)
    except OSError as error:
        text = f"cannot be read: {error}"
    return piece.path, text


def _check_contents(file: int, piece: _Piece, meter: _Meter) -> str | None:
    buffer = memoryview(bytearray(_BUFFER))
    bulk = piece.entry.bulk
    if bulk is None:
        raw = hash_extent(file, 0, piece.entry.size, algorithm=Algorithm.SHA256, buffer=buffer)
        meter.add(piece.entry.size)
        return None if raw is not None and raw.hex() == piece.entry.sha256 else "its digest differs"
    wrong = None
    for index in piece.blocks:
        offset, length = bulk.extent(index)
        found = hash_extent(file, offset, length, algorithm=bulk.algorithm, buffer=buffer)
        if found != bulk.expected(index):
            wrong = wrong or f"the digest of block {index} (at byte {offset}) differs"
        meter.add(length)
    return wrong
