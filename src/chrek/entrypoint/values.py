"""Typed reads of an environment; each raises `UsageError` with the variable, its value and what is allowed."""

from __future__ import annotations

from enum import Enum

from chrek.errors import Reason, UsageError

TYPE_CHECKING = False  # see chrek.system.ids

if TYPE_CHECKING:
    from collections.abc import Mapping

TRUE = ("1", "true", "yes", "on")
FALSE = ("0", "false", "no", "off")
ID_MAX = 63
_ALNUM = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789")
_ID_CHARS = _ALNUM | frozenset("._-")
REQUIRED_IN_CHECKPOINT = (
    "DYN_CHECKPOINT_SIGNAL_FILE",
    "DYN_CHECKPOINT_READY_FILE",
    "DYN_CHECKPOINT_HASH",
    "DYN_CHECKPOINT_LOCATION",
    "DYN_CHECKPOINT_STORAGE_TYPE",
)


class Block(Enum):
    """Whether io_uring and MPTCP are hidden: where that changes nothing else, always, never."""

    AUTO = "auto"
    TRUE = "true"
    FALSE = "false"


class Values:
    """An environment, read by type."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ

    def bad(self, name: str, allowed: str, *, reason: Reason = Reason.BAD_VALUE) -> UsageError:
        """Return the error for a value that is not allowed."""
        return UsageError(reason, f"{name} is {self._environ.get(name, '')!r}.", cure=f"Allowed: {allowed}.")

    def require(self, name: str) -> None:
        """Raise unless the variable is there."""
        if name not in self._environ:
            raise UsageError(
                Reason.BAD_VALUE,
                f"DYN_CHECKPOINT_SIGNAL_FILE is set, so {name} must be set too; it is missing.",
                cure=f"A checkpoint job needs all of {', '.join(REQUIRED_IN_CHECKPOINT)}.",
            )

    def boolean(self, name: str, *, default: bool) -> bool:
        """Return a boolean, any case."""
        value = self._environ.get(name)
        if value is None:
            return default
        if value.lower() in TRUE:
            return True
        if value.lower() in FALSE:
            return False
        raise self.bad(name, f"{'/'.join(TRUE)} and {'/'.join(FALSE)}, any case")

    def integer(self, name: str, default: int, *, maximum: int) -> int:
        """Return a whole number from 0 to `maximum`."""
        value = self._environ.get(name)
        if value is None:
            return default
        if not _digits(value) or int(value) > maximum:
            raise self.bad(name, f"a whole number from 0 to {maximum}")
        return int(value)

    def seconds(self, name: str, default: float) -> float:
        """Return a time in seconds, zero or more, decimals allowed."""
        value = self._environ.get(name)
        if value is None:
            return default
        whole, point, fraction = value.partition(".")
        if not _digits(whole) or (point and not _digits(fraction)):
            raise self.bad(name, "seconds, zero or more, such as 0, 30 or 2.5")
        return float(value)

    def path(self, name: str, default: str) -> str:
        """Return an absolute path."""
        value = self._environ.get(name, default)
        if name in self._environ and (not value.startswith("/") or ".." in value.split("/")):
            raise self.bad(name, "an absolute path without '..'")
        return value

    def choice(self, name: str, allowed: list[str]) -> str:
        """Return one of the allowed words, any case; the first one is the default."""
        value = self._environ.get(name, allowed[0]).lower()
        if value not in allowed:
            raise self.bad(name, ", ".join(allowed))
        return value

    def block(self) -> Block:
        """Return CHREK_BLOCK_IO_URING, where true and false may be any boolean."""
        name = "CHREK_BLOCK_IO_URING"
        value = self._environ.get(name, "auto").lower()
        if value == "auto":
            return Block.AUTO
        if value in TRUE + FALSE:
            return Block.TRUE if value in TRUE else Block.FALSE
        raise self.bad(name, f"auto, {'/'.join(TRUE)} and {'/'.join(FALSE)}, any case")

    def reasons(self, name: str) -> tuple[str, ...]:
        """Return a comma list of reason codes."""
        value = self._environ.get(name, "")
        codes = tuple(item.strip() for item in value.split(",")) if value.strip() else ()
        if any(code not in Reason.__members__ for code in codes):
            raise self.bad(name, "a comma list of reason codes, such as SYSV_IPC_IN_USE")
        return codes

    def checkpoint_id(self, name: str) -> str:
        """Return a valid checkpoint id; it becomes a directory's name."""
        value = self._environ.get(name, "")
        if not (0 < len(value) <= ID_MAX and value[0] in _ALNUM and _ID_CHARS.issuperset(value)):
            raise self.bad(name, f"1 to {ID_MAX} of A-Z a-z 0-9 . _ -, first a letter or digit", reason=Reason.BAD_ID)
        return value

    def storage_type(self) -> None:
        """Raise unless the storage type is one that exists."""
        name = "DYN_CHECKPOINT_STORAGE_TYPE"
        value = self._environ.get(name, "pvc")
        if value in ("s3", "oci"):
            raise self.bad(name, "pvc; s3 and oci are reserved and do not exist yet")
        if value != "pvc":
            raise self.bad(name, "pvc")


def _digits(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 12
