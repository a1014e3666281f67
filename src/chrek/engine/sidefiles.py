"""CRIU's link-remap files: part of the checkpoint wherever they lie.

For an open file whose name is gone while another name of it remains, CRIU makes a link ``link_remap.N`` beside
where the name was, and a restore consumes it. Inside volumes and changed roots it travels in their archives;
anywhere else (the machine's own file system, a volume of others) it is taken as a file of its own.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from chrek.artifact import SideFile
from chrek.criu.images import read_all
from chrek.criu.messages import File, Remap
from chrek.engine.container import closing_fd
from chrek.errors import Reason, Refused
from chrek.rootfs import links

if TYPE_CHECKING:
    from collections.abc import Collection

    from chrek.artifact import Checkpoint
    from chrek.engine.container import Container

FOLDER = "links"
_LINKED = 0
"""``remap_type`` of CRIU's ``images/remap-file-path.proto``."""


def save(container: Container, images: int, folder: int, *, covered: Collection[str]) -> list[SideFile]:
    """Copy the link-remap files that no archive holds into the checkpoint's ``links/``, open at *folder*.

    *covered* are the paths of volumes whose contents are taken.

    Raises:
        CaptureFailed: one cannot be copied.
    """
    paths = [path for path in _paths(images) if not _is_archived(container, path, covered)]
    if not paths:
        return []
    with closing_fd(container.open_root()) as root:
        saved = links.save_links(root, [os.fsencode(path) for path in paths], folder)
    return [
        SideFile(path=path, file=f"{FOLDER}/{side.file}", mode=side.mode, uid=side.uid, gid=side.gid)
        for path, side in zip(paths, saved, strict=True)
    ]


def put_back(checkpoint: Checkpoint, root: int) -> list[bytes]:
    """Put the files where CRIU looks for them below *root*; return what was made, for `chrek.rootfs.remove_links`.

    Raises:
        Refused, RestoreFailed: as `chrek.rootfs.put_back_links`; nothing was made.
    """
    sides = [
        links.SideFile(
            os.fsencode(side.path.lstrip("/")), side.file.removeprefix(f"{FOLDER}/"), side.mode, side.uid, side.gid
        )
        for side in checkpoint.manifest.side_files
    ]
    if not sides:
        return []
    try:
        folder = os.open(FOLDER, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=checkpoint.fd)
    except OSError as error:
        raise Refused(Reason.CORRUPT, f"{FOLDER}/ of the checkpoint: {error.strerror}.") from error
    with closing_fd(folder):
        return links.put_back_links(sides, folder, root)


def _paths(images: int) -> list[str]:
    try:
        remaps = read_all(images, "remap-fpath.img", Remap)
    except Refused:
        return []  # there is no such image when nothing was remapped
    wanted = {remap.remap_id for remap in remaps if (remap.type or _LINKED) == _LINKED}
    files = read_all(images, "files.img", File) if wanted else []
    return sorted({file.regular.name for file in files if file.regular is not None and file.id in wanted})


def _is_archived(container: Container, path: str, covered: Collection[str]) -> bool:
    if any(path.startswith(f"{volume.rstrip('/')}/") for volume in covered):
        return True
    mount = container.mount_of(path)
    return container.has_own_root and mount is not None and mount.point == "/"
