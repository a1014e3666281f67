"""The completion marker ``checkpoint.done``, and the signal file that tells an application the same.

Both hold one JSON object. The marker is written last and seals the checkpoint: it has the digest of
the manifest, which has the digests of everything else, and a digest of its own text. A signal file
has no seal: it is read by applications that look at ``success`` and ``error`` only.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from chrek.artifact import strictjson
from chrek.artifact.codec import decode, encode, open_section
from chrek.artifact.digest import check_sha256
from chrek.artifact.names import is_checkpoint_id, unix_time
from chrek.errors import Reason, Refused

if TYPE_CHECKING:
    from collections.abc import Mapping

FILE_NAME: Final = "checkpoint.done"
MAX_BYTES: Final = 64 << 10

_SEAL: Final = "seal"


@open_section
@dataclass(frozen=True, kw_only=True)
class _Fields:
    checkpoint_id: str
    checkpoint_path: str
    timestamp: str
    success: bool
    error: str | None = None
    manifest_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Marker:
    """The outcome of a capture.

    *extra* holds any further keys (pod UID, container id); its values are JSON values.
    """

    checkpoint_id: str
    checkpoint_path: str
    timestamp: str
    success: bool
    error: str | None = None
    manifest_sha256: str | None = None
    extra: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not is_checkpoint_id(self.checkpoint_id):
            raise ValueError(f"{self.checkpoint_id[:80]!r} is not a checkpoint id")
        unix_time(self.timestamp)
        if self.manifest_sha256 is not None:
            check_sha256(self.manifest_sha256)
        if self.success == (self.error is not None):
            raise ValueError("error is there if and only if success is false")

    def to_json(self) -> bytes:
        """Return the text of a signal file."""
        return strictjson.render(self._members())

    def to_sealed_json(self) -> bytes:
        """Return the text of ``checkpoint.done``."""
        members = self._members()
        seal = hashlib.sha256(strictjson.render(members)).hexdigest()
        return strictjson.render({**members, _SEAL: seal})

    def _members(self) -> dict[str, object]:
        known = {name: getattr(self, name) for name in _Fields.__dataclass_fields__}
        members = encode({name: value for name, value in known.items() if value is not None})
        clash = self.extra.keys() & {*known, _SEAL}
        if clash:
            raise ValueError(f"extra keys {sorted(clash)} are ChReK's own")
        return {**members, **self.extra}


def read_marker(text: bytes, *, document: str = FILE_NAME) -> Marker:
    """Read a ``checkpoint.done`` or a signal file; a seal, if there is one, must fit.

    Raises:
        Refused: ``CORRUPT``.
    """
    return _read(text, document)[0]


def read_sealed_marker(text: bytes, *, document: str = FILE_NAME) -> Marker:
    """Read a ``checkpoint.done``: sealed, successful, and with the digest of a manifest.

    Raises:
        Refused: ``CORRUPT``.
    """
    marker, sealed = _read(text, document)
    if not sealed or not marker.success or marker.manifest_sha256 is None:
        raise Refused(Reason.CORRUPT, f"{document} is not the sealed marker of a successful checkpoint.")
    return marker


def _read(text: bytes, document: str) -> tuple[Marker, bool]:
    value = strictjson.parse(text, document=document)
    fields = decode(_Fields, value, document=document)
    members: dict[str, object] = value if isinstance(value, dict) else {}
    known = {name: getattr(fields, name) for name in _Fields.__dataclass_fields__}
    extra = {name: member for name, member in members.items() if name not in known and name != _SEAL}
    try:
        marker = Marker(**known, extra=extra)
    except ValueError as error:
        raise Refused(Reason.CORRUPT, f"{document}: {error}.") from error
    if _SEAL in members:
        _check_seal(text, members, document)
    return marker, _SEAL in members


def _check_seal(text: bytes, members: dict[str, object], document: str) -> None:
    rest = {name: member for name, member in members.items() if name != _SEAL}
    seal = hashlib.sha256(strictjson.render(rest)).hexdigest()
    if members[_SEAL] != seal or text != strictjson.render({**rest, _SEAL: seal}):
        raise Refused(Reason.CORRUPT, f"{document} was changed after it was written: its seal does not fit.")
