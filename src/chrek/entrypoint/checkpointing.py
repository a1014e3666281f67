"""Checkpoint mode: the signal file before the application starts, and the verdict after it has ended.

The file tells the application that its checkpoint is finished. One that an earlier run left would end
it at once, so what is older than this container goes. An application may exit 0 at the file's mere
existence, as the guide's sample does; when the file says that the checkpoint failed, the Job must fail
too, so the init then ends with 170 or 172 in its place.
"""

from __future__ import annotations

import os
import stat
import time

from chrek.entrypoint.report import age
from chrek.errors import CaptureFailed, ExitCode, Reason

_SIZE_MAX = 65536


def remove_stale(path: str) -> bool:
    """Remove a signal file older than this container; return whether there was one.

    Raise `CaptureFailed` when it cannot be removed: the application would take it for its own.
    """
    started = time.time() - age()
    try:
        if os.lstat(path).st_mtime >= started:
            return False
        os.unlink(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise CaptureFailed(
            Reason.WRITE_FAILED,
            f"An old signal file {path} cannot be removed ({error.strerror}); the application would take it"
            " for the end of its checkpoint.",
            cure="Remove it, mount its directory writable, or use another name.",
        ) from error
    return True


def verdict(path: str) -> tuple[ExitCode, str] | None:
    """Return how a container ends whose application exited 0, or None when its checkpoint is good.

    A signal file that is missing or cannot be read says nothing.
    """
    fields = signal_file(path)
    if fields.get("success") is not False:
        return None
    code = ExitCode.REFUSED if fields.get("refused") is True else ExitCode.CAPTURE_FAILED
    return code, str(fields.get("error") or "the signal file gives no error")


def signal_file(path: str) -> dict[str, object]:
    """Return what a signal file says, empty when it is missing, cannot be read or is none."""
    import json  # noqa: PLC0415 - only now: 1.3 MB that a running application need not pay for

    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return {}
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return {}
        fields = json.loads(os.read(descriptor, _SIZE_MAX))
    except (OSError, ValueError, RecursionError):
        return {}
    finally:
        os.close(descriptor)
    return fields if isinstance(fields, dict) else {}
