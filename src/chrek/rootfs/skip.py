"""What is left out of an archive of files.

Only what the runtime puts into every container by itself is left out by default: everything else the
application changed is its state, wherever it lies. Users may leave out more by patterns.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from typing import Final

INJECTED: Final = frozenset({b"etc/resolv.conf", b"etc/hosts", b"etc/hostname", b"run/secrets"})
"""Files that container runtimes write or mount into the root, each container its own."""

JOURNAL_PREFIX: Final = b".chrek-undo."
"""Name of the directory that an unfinished restore leaves in the root (see `journal`)."""


class Skip:
    """Decides for each path, relative to the root, whether it and all below it is left out.

    A pattern that begins with ``/`` is compared with the whole path, any other with the last name; both as
    shells do (``*`` also matches ``/``).
    """

    def __init__(self, paths: Iterable[bytes] = (), patterns: Iterable[str] = ()) -> None:
        self._paths = frozenset(path.strip(b"/") for path in paths)
        self._whole = _compile(p.removeprefix("/") for p in patterns if p.startswith("/"))
        self._names = _compile(p for p in patterns if not p.startswith("/"))

    def __call__(self, path: bytes, name: bytes) -> bool:
        """Tell whether *path*, whose last component is *name*, is left out."""
        return (
            path in self._paths
            or (name.startswith(JOURNAL_PREFIX) and name == path)
            or (self._whole is not None and self._whole.match(path) is not None)
            or (self._names is not None and self._names.match(name) is not None)
        )


def _compile(patterns: Iterable[str]) -> re.Pattern[bytes] | None:
    regexes = [fnmatch.translate(p).encode("utf-8", "surrogateescape") for p in patterns]
    return re.compile(b"|".join(regexes)) if regexes else None
