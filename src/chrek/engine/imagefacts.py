"""Which image a container was made of, as `checkpoint-enable` wrote it into the image itself.

Inside a pod nobody can ask a runtime for an image's digest; this file is what a restore from inside can know. The
workload may have changed it, so a difference refuses a restore, and no difference proves nothing.
"""

from __future__ import annotations

import json
import os
import stat
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from chrek.engine.container import closing_fd
from chrek.rootfs import fd as fds

if TYPE_CHECKING:
    from chrek.engine.container import Container

PATH: Final = "opt/chrek/image.json"
_LARGEST: Final = 64 << 10
_LONGEST: Final = 256


def build_id(container: Container) -> str | None:
    """Return the build id of a container's image, None where the image says none.

    Raises:
        Refused: ``APP_NOT_FOUND``, the container is gone.
    """
    with suppress(ValueError, RecursionError):
        found = json.loads(_read(container) or b"null")
        value = found.get("build_id") if isinstance(found, dict) else None
        if isinstance(value, str) and value and len(value) <= _LONGEST and value.isprintable():
            return value
    return None


def _read(container: Container) -> bytes | None:
    """Return what the file holds; it is opened once it is known to be a regular one, and no link leads out."""
    with closing_fd(container.open_root()) as root:
        try:
            held = fds.openat2(root, PATH.encode(), os.O_PATH, resolve=fds.IN_ROOT | fds.NO_MAGICLINKS)
        except OSError:
            return None
        with closing_fd(held):
            if not stat.S_ISREG(os.fstat(held).st_mode):
                return None
            try:
                with open(f"/proc/self/fd/{held}", "rb", buffering=0) as file:
                    return file.read(_LARGEST)
            except OSError:
                return None
