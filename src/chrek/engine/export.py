"""Export: a checkpoint as the image directory that CRIU itself would have written.

The images of a checkpoint are CRIU's own but for the pages that ChReK moved into shards; those are merged back
into ``pagemap-PID.img`` and ``pages-N.img``. Archives of file changes are copied beside them under their names:
CRIU knows nothing of them, and whoever restores has to unpack them first.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chrek.artifact import Level
from chrek.criu import export, pagemaps
from chrek.engine.contents import DAMAGE
from chrek.errors import ChrekError, Reason, Refused
from chrek.memory.index import INDEX_NAME, SKIPPED
from chrek.memory.shard import Folders, read_index

if TYPE_CHECKING:
    from chrek.artifact import Checkpoint
    from chrek.criu.export import Piece
    from chrek.memory.index import Index, PageFile

_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

Listener = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Exported:
    """What was written: bytes of memory, the archives that were copied, and how to restore it."""

    memory_bytes: int
    archives: tuple[str, ...]
    command: tuple[str, ...]


def export_checkpoint(
    checkpoint: Checkpoint, target: str, *, level: Level = Level.FULL, listener: Listener | None = None
) -> Exported:
    """Write *checkpoint* to the new or empty directory *target*.

    Raises:
        Refused: ``CORRUPT``; ``BAD_VALUE`` when the directory is not empty. Nothing was written.
        ChrekError: ``WRITE_FAILED`` or ``NO_SPACE``; what was written is removed again.
    """
    tell = listener or (lambda *_: None)
    checkpoint.verify(level, progress=lambda done, total: tell("verifying", done, total)).require_ok(checkpoint.id)
    made = _make_directory(target)
    try:
        with ExitStack() as stack:
            return _export(checkpoint, target, stack, tell)
    except DAMAGE as error:
        _clear(target, made=made)
        raise Refused(Reason.CORRUPT, f"The images of checkpoint {checkpoint.id} make no sense: {error!r}.") from error
    except BaseException as error:
        _clear(target, made=made)
        if isinstance(error, OSError):
            reason = Reason.NO_SPACE if error.errno in {28, 122} else Reason.WRITE_FAILED
            message = f"Exporting to {target}: {error.strerror}."
            raise ChrekError(reason, message, cure="Export to a file system with enough free space.") from error
        raise


def _make_directory(target: str) -> bool:
    """Make the directory; return whether it was not there."""
    try:
        os.mkdir(target, 0o700)
    except FileExistsError:
        if os.path.isdir(target) and not os.listdir(target):
            return False
        raise Refused(
            Reason.BAD_VALUE, f"{target} is there and is no empty directory.", cure="Name a new or an empty directory."
        ) from None
    except OSError as error:
        raise Refused(
            Reason.BAD_VALUE, f"{target} cannot be made: {error.strerror}.", cure="Name a directory that can be made."
        ) from error
    return True


def _clear(target: str, *, made: bool) -> None:
    """Remove what was written, and the directory if it was made for it."""
    for name in os.listdir(target):
        path = f"{target}/{name}"
        shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)
    if made:
        os.rmdir(target)


def _export(checkpoint: Checkpoint, target: str, stack: ExitStack, tell: Listener) -> Exported:
    def directory(name: str, at: int | None = None) -> int:
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
        stack.callback(os.close, fd)
        return fd

    out = directory(target)
    images, memory = directory("images", checkpoint.fd), directory("memory", checkpoint.fd)
    index = read_index(memory, checkpoint.manifest.files.get(f"memory/{INDEX_NAME}"))
    files = _open_page_files(index, Folders(memory, memory), stack)
    processes = pagemaps.read(images)
    written = {process.image.name for process in processes} | {f"pages-{process.pages_id}.img" for process in processes}
    for path in checkpoint.manifest.files:
        folder, _, name = path.partition("/")
        if folder == "images" and name not in written:
            _copy(checkpoint, path, out, name)
    moved = _moved(index, files)
    total = 0
    for process in processes:
        pages = os.open(f"pages-{process.pages_id}.img", _FLAGS, dir_fd=images)
        stack.callback(os.close, pages)
        pieces = [*export.kept_pieces(process, pages), *moved.pop(process.pid, [])]
        total += export.write_pages(out, process, pieces)
        tell("writing", total, index.size)
    if moved:
        raise Refused(Reason.CORRUPT, f"The memory index has pages of process {min(moved)}, which has no pagemap.")
    archives = [path for path in checkpoint.manifest.files if path == "rootfs.tar" or path.startswith("volumes/")]
    for path in archives:
        _copy(checkpoint, path, out, path.replace("/", "-"))
    return Exported(total, tuple(path.replace("/", "-") for path in archives), restore_command(checkpoint, target))


def _open_page_files(index: Index, folders: Folders, stack: ExitStack) -> dict[PageFile, int]:
    found = {}
    for file in index.files:
        found[file] = os.open(file.name, _FLAGS, dir_fd=folders.of(file))
        stack.callback(os.close, found[file])
    return found


def _moved(index: Index, files: dict[PageFile, int]) -> dict[int, list[Piece]]:
    """Return the pieces that lie in shards, by process."""
    found: dict[int, list[Piece]] = {pid: [] for pid in index.pids}
    for block in index.blocks():
        offset = block.offset
        for address, pages, process in index.runs_of(block):
            length = pages * pagemaps.PAGE
            if process != SKIPPED:
                found[index.pids[process]].append(export.Piece(address, length, files[block.file], offset))
            offset += length
    return found


def _copy(checkpoint: Checkpoint, path: str, out: int, name: str) -> None:
    with open(checkpoint.open(path), "rb") as source:
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=out)
        with open(fd, "wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)


def restore_command(checkpoint: Checkpoint, target: str) -> tuple[str, ...]:
    """Return the command line with which plain CRIU restores an exported checkpoint.

    Each standard stream that came from outside is taken from the descriptor of that number.
    """
    streams = checkpoint.manifest.application.standard_streams
    keys = {stream.key: number for number, stream in sorted(streams.items(), reverse=True) if stream.key is not None}
    inherit = [f"fd[{number}]:{key}" for key, number in sorted(keys.items(), key=lambda item: item[1])]
    options = [word for item in inherit for word in ("--inherit-fd", item)]
    fixed = ("--tcp-established", "--ext-unix-sk", "--file-locks", "--link-remap", "--manage-cgroups=ignore")
    return ("criu", "restore", "-D", target, *fixed, "--network-lock", "skip", *options)
