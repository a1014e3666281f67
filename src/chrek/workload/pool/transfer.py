"""Moving regions of GPU memory to files and back, at the speed of the link.

Threads, each with a stream and a small pinned buffer (`chrek.workload.pool.lane`): while one piece
crosses the link the next is read or written. The calls of the loop that take time let go of Python's
lock, so threads are enough.

Nothing is freed here: if a transfer fails, the caller's memory is what it was (`save`), or undefined
and the caller drops it (`load`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from chrek.workload.pool import files
from chrek.workload.pool.cuda import Cuda, Primary
from chrek.workload.pool.digest import LANES, SHA256, digester
from chrek.workload.pool.errors import PoolCorrupt, PoolError
from chrek.workload.pool.lane import Lane
from chrek.workload.pool.layout import BLOBS, INDEX, Blob, Block, Index, Piece, Region, plan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


@dataclass(frozen=True)
class Options:
    """How to move bytes; the defaults are what was quickest on an H100 with 16 cores.

    `threads` serve all devices together. Each has a pinned buffer of `slots` times `chunk` bytes. `direct`
    says whether to go around the page cache (`files.AUTO`, `files.ON`, `files.OFF`).
    """

    threads: int = 12
    slots: int = 2
    chunk: int = 4 << 20
    direct: str = files.AUTO


@dataclass
class Report:
    """What a transfer did. `size` is GPU memory, `moved` what crossed the link, in bytes."""

    size: int = 0
    moved: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a step."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start

    def __str__(self) -> str:
        phases = " ".join(f"{name}={seconds:.3f}s" for name, seconds in self.seconds.items())
        rate = self.moved / 1e9 / max(self.seconds.get("copy", 0.0), 1e-9)
        return f"{self.size / 1e9:.2f} GB, moved {self.moved / 1e9:.2f} GB at {rate:.1f} GB/s, {phases}"


class _Jobs:
    """Blobs waiting for a thread, and the first failure."""

    def __init__(self, blobs: Sequence[Blob]) -> None:
        self._lock = threading.Lock()
        self._waiting = iter(list(enumerate(blobs)))
        self.error: BaseException | None = None

    def __iter__(self) -> Iterator[tuple[int, Blob]]:
        while self.error is None:
            with self._lock:
                job = next(self._waiting, None)
            if job is None:
                return
            yield job

    def fail(self, error: BaseException) -> None:
        with self._lock:
            self.error = self.error or error


def _in_threads(cuda: Cuda, blobs: Sequence[Blob], options: Options, work: Callable[[Lane, _Jobs], None]) -> None:
    """Run `work` for every device's blobs in threads of that device; raises the first failure."""
    devices = sorted({blob.device for blob in blobs})
    threads, queues = [], []
    for device in devices:
        mine = [blob for blob in blobs if blob.device == device]
        jobs = _Jobs(mine)
        queues.append(jobs)
        for number in range(min(len(mine), max(1, options.threads // len(devices)))):
            lane = (options.slots, options.chunk)
            arguments = (cuda, device, jobs, work, lane)
            threads.append(threading.Thread(target=_thread, args=arguments, name=f"chrek-pool-{device}-{number}"))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for jobs in queues:
        if jobs.error is not None:
            raise jobs.error


def _thread(cuda: Cuda, device: int, jobs: _Jobs, work: Callable[[Lane, _Jobs], None], shape: tuple[int, int]) -> None:
    try:
        with Primary(cuda, device), contextlib.closing(Lane(cuda, *shape)) as lane:
            work(lane, jobs)
    except BaseException as error:  # noqa: BLE001 - raised in the caller's thread
        jobs.fail(error)


# --- out ----------------------------------------------------------------------------------------------
def save(
    cuda: Cuda,
    regions: Sequence[Region],
    directory: str,
    *,
    pool: str,
    options: Options | None = None,
    known: Sequence[str] = (),
) -> tuple[Index, Report]:
    """Write the contents of `regions` to blobs under `directory`, which is this pool's own, and the index last.

    The devices must be idle. Blobs of `known` directories with the same contents are linked instead of
    written. Raises `PoolError` (with its cause); the memory is never touched.
    """
    options = options or Options()
    report = Report(size=sum(region.size for region in regions))
    blobs_directory = os.path.join(directory, BLOBS)
    index = Index(pool, LANES, list(regions), plan(regions))
    try:
        os.makedirs(blobs_directory, mode=0o700, exist_ok=True)
        with report.phase("digest"):
            index.digest = _digest(cuda, index)
        missing = list(index.stored())
        if index.digest == LANES:
            missing = files.reuse(blobs_directory, missing, known)
        _check_space(blobs_directory, sum(blob.size for blob in missing))
        with report.phase("copy"):
            _in_threads(cuda, missing, options, _Writer(blobs_directory, index.digest, options))
        report.moved = sum(blob.size for blob in missing)
        _write_index(directory, index)
        files.prune(blobs_directory, index)
    except OSError as error:
        raise PoolError(f"saving pool {pool!r} to {directory} failed: {error}") from error
    return index, report


def _digest(cuda: Cuda, index: Index) -> str:
    """Fill in the digests on the GPU; the kind of digest that the index has then."""
    for device in sorted({region.device for region in index.regions}):
        kernel = digester(cuda, device)
        if kernel is None:
            index.blobs = plan(index.regions)  # without what other devices have digested
            return SHA256
        blocks = [block for blob in index.blobs if blob.device == device for block in blob.blocks]
        with contextlib.closing(kernel):
            digests = kernel.digests([(block.address, block.size) for block in blocks])
        for block, digest in zip(blocks, digests):
            block.digest, block.zero = digest, digest is None
    return LANES


def _check_space(directory: str, needed: int) -> None:
    stat = os.statvfs(directory)
    free = stat.f_bavail * stat.f_frsize
    if stat.f_blocks and free < needed:
        raise PoolError(f"{directory} has {free / 1e9:.1f} GB free; the pool needs {needed / 1e9:.1f} GB")


class _Writer:
    """Blobs of one device to files."""

    def __init__(self, directory: str, digest: str, options: Options) -> None:
        self._directory = directory
        self._hash = digest == SHA256
        self._direct = options.direct

    def __call__(self, lane: Lane, jobs: _Jobs) -> None:
        waiting: list[tuple[files.Output, Piece] | None] = [None] * lane.slots
        outputs: list[files.Output] = []
        digest = hashlib.sha256()
        try:
            for number, blob in jobs:
                output = files.create(self._directory, blob, number + blob.device * 1_000_000, self._direct)
                outputs.append(output)
                for piece in blob.pieces(lane.chunk):
                    slot = lane.next()
                    digest = self._finish(lane, slot, waiting, digest)
                    lane.out(slot, piece)
                    waiting[slot] = (output, piece)
            for _ in range(lane.slots):
                digest = self._finish(lane, lane.next(), waiting, digest)
        finally:
            for output in outputs:
                output.abandon()

    def _finish(
        self, lane: Lane, slot: int, waiting: list[tuple[files.Output, Piece] | None], digest: hashlib._Hash
    ) -> hashlib._Hash:
        """Write the piece that a slot holds; the digest of its block so far."""
        if (job := waiting[slot]) is None:
            return digest
        waiting[slot] = None
        output, piece = job
        lane.wait(slot)
        view = lane.view(slot, piece.size)
        if self._hash:
            digest.update(view)
            if piece.last:
                piece.block.digest, digest = digest.digest(), hashlib.sha256()
        output.write(view, piece.offset)
        return digest


def _write_index(directory: str, index: Index) -> None:
    temporary = os.path.join(directory, f".{INDEX}")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w") as file:
        file.write(index.to_json())
    os.rename(temporary, os.path.join(directory, INDEX))


# --- back ---------------------------------------------------------------------------------------------
def load(cuda: Cuda, index: Index, directory: str, *, options: Options | None = None) -> Report:
    """Put the contents of `index` back to the addresses they came from; physical memory must be there.

    Raises `PoolCorrupt` if a block is not what it was, `PoolError` for everything else; the contents
    are undefined then.
    """
    options = options or Options()
    report = Report(size=index.size)
    try:
        with report.phase("copy"):
            work = _Reader(cuda, os.path.join(directory, BLOBS), index.digest, options)
            _in_threads(cuda, index.blobs, options, work)
        report.moved = sum(blob.size for blob in index.stored())
        if index.digest == LANES:
            with report.phase("digest"):
                _check(cuda, index)
    except OSError as error:
        raise PoolError(f"loading pool {index.pool!r} from {directory} failed: {error}") from error
    return report


class _Reader:
    """Blobs of one device from files."""

    def __init__(self, cuda: Cuda, directory: str, digest: str, options: Options) -> None:
        self._cuda = cuda
        self._directory = directory
        self._hash = digest == SHA256
        self._direct = options.direct

    def __call__(self, lane: Lane, jobs: _Jobs) -> None:
        for _, blob in jobs:
            for block in blob.blocks:
                if block.zero:
                    self._cuda.call("cuMemsetD8Async", block.address, 0, block.size, lane.stream)
            if blob.size:
                self._read(lane, blob, os.path.join(self._directory, blob.name))

    def _read(self, lane: Lane, blob: Blob, path: str) -> None:
        fd = files.open_blob(path, blob.size, self._direct)
        digest = hashlib.sha256()
        try:
            for piece in blob.pieces(lane.chunk):
                slot = lane.next()
                lane.wait(slot)
                view = lane.view(slot, piece.size)
                files.read(fd, view, piece.offset, path)
                if self._hash:
                    digest.update(view)
                lane.into(slot, piece)
                if self._hash and piece.last:
                    if digest.digest() != piece.block.digest:
                        raise _corrupt(path, piece.offset, piece.block)
                    digest = hashlib.sha256()
        finally:
            os.close(fd)


def _check(cuda: Cuda, index: Index) -> None:
    """Compare what is on the GPU now with the index."""
    for device in sorted({region.device for region in index.regions}):
        kernel = digester(cuda, device)
        if kernel is None:
            raise PoolError("the digest kernel was loaded when the pool was saved and cannot be loaded now")
        pairs = [(blob, block) for blob in index.blobs if blob.device == device for block in blob.blocks]
        with contextlib.closing(kernel):
            digests = kernel.digests([(block.address, block.size) for _, block in pairs])
        for (blob, block), digest in zip(pairs, digests):
            if digest != (None if block.zero else block.digest):
                raise _corrupt(blob.name, block.address - blob.blocks[0].address, block)


def _corrupt(path: str, offset: int, block: Block) -> PoolCorrupt:
    return PoolCorrupt(
        f"{path}: the {block.size} bytes that belong to GPU address {block.address:#x} (block at {offset}) "
        f"are not those that were saved"
    )
