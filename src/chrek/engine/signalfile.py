"""The signal file: how an application in checkpoint mode learns that its checkpoint is finished, or failed.

It is written inside the container, at the path that PID 1's environment names, atomically and by descriptors:
nothing in the container's file system can lead the write elsewhere. A container that is not in checkpoint mode
gets none.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from chrek.artifact import Marker, timestamp
from chrek.engine.container import closing_fd
from chrek.engine.replay import write_file
from chrek.errors import CaptureFailed, ChrekError, Reason, Refused, UsageError
from chrek.rootfs import fd as fds

if TYPE_CHECKING:
    from chrek.engine.container import Container

VARIABLE = "DYN_CHECKPOINT_SIGNAL_FILE"


def path_in(container: Container) -> str | None:
    """Return where the container wants its signal file; None when it is not in checkpoint mode.

    Raises:
        Refused: ``APP_NOT_FOUND``, when PID 1 is gone.
    """
    return container.environment.get(VARIABLE)


def marker(
    checkpoint_id: str, *, path: str, error: ChrekError | None = None, extra: Mapping[str, object] | None = None
) -> Marker:
    """Return what a signal file says: success, or the *error* with its reason.

    *path* is the checkpoint's, as the container sees it; *extra* adds keys (pod UID, container id).
    """
    more: dict[str, object] = dict(extra or {})
    if error is not None:
        # A refusal will be refused again: the init ends with another exit code, so that a Job need not retry.
        more |= {"reason": error.reason.code, "refused": isinstance(error, Refused | UsageError)}
    return Marker(
        checkpoint_id=checkpoint_id,
        checkpoint_path=path,
        timestamp=timestamp(time.time()),
        success=error is None,
        error=None if error is None else str(error),
        extra=more,
    )


def write(container: Container, content: Marker) -> bool:
    """Write the signal file of a container in checkpoint mode; return whether it is in that mode.

    Raises:
        CaptureFailed: ``WRITE_FAILED``; the application waits for a file that cannot be written.
    """
    path = path_in(container)
    if path is None:
        return False
    parent, name = fds.split(os.fsencode(path.strip("/")))
    try:
        with closing_fd(container.open_root()) as root, closing_fd(fds.open_in_root(root, parent or b".")) as directory:
            write_file(directory, name, content.to_json())
    except OSError as error:
        raise CaptureFailed(
            Reason.WRITE_FAILED,
            f"The signal file {path} cannot be written in the container: {error.strerror}.",
            cure=f"Make {os.path.dirname(path)} a writable directory there; the application waits for that file.",
        ) from error
    return True
