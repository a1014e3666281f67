"""What the container's environment asks for, checked before anything runs.

Pure: a mapping goes in, a `Settings` comes out, or a `UsageError` that names the variable, its value
and what is allowed. A wrong value ends the container with exit code 2 at once instead of after
minutes of loading a model.

Three modes. ``DYN_CHECKPOINT_SIGNAL_FILE`` means checkpoint mode whatever else is set, so a rerun Job
never restores itself. ``DYN_CHECKPOINT_HASH`` alone means restore mode. Neither: plain, where only
ChReK's own ``CHREK_`` names are looked at, because ``DEBUG`` and others belong to the application
there.
"""

from __future__ import annotations

from enum import Enum

from chrek.errors import Reason, UsageError
from chrek.system.record import record

TYPE_CHECKING = False  # see chrek.system.ids

if TYPE_CHECKING:
    from collections.abc import Mapping

TRUE = ("1", "true", "yes", "on")
FALSE = ("0", "false", "no", "off")
ID_MAX = 63
_ALNUM = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789")
_ID_CHARS = _ALNUM | frozenset("._-")
_REQUIRED_IN_CHECKPOINT = (
    "DYN_CHECKPOINT_SIGNAL_FILE",
    "DYN_CHECKPOINT_READY_FILE",
    "DYN_CHECKPOINT_HASH",
    "DYN_CHECKPOINT_LOCATION",
    "DYN_CHECKPOINT_STORAGE_TYPE",
)


class Mode(Enum):
    """What the container is for."""

    CHECKPOINT = "checkpoint"
    RESTORE = "restore"
    PLAIN = "plain"


class OnFailure(Enum):
    """What follows a failed restore: a cold start, or exit code 171."""

    COLD = "cold"
    FAIL = "fail"


class Block(Enum):
    """Whether io_uring is answered with ENOSYS: where that changes nothing else, always, never."""

    AUTO = "auto"
    TRUE = "true"
    FALSE = "false"


class Verify(Enum):
    """How much of a checkpoint's bulk data is verified before it is used."""

    FULL = "full"
    SAMPLED = "sampled"
    OFF = "off"


@record
class CriuSettings:
    """CRIU's knobs of a restore from inside; times in seconds, 0 is unlimited."""

    timeout: int = 0
    log_level: int = 4
    work_dir: str = "/tmp"
    cuda_plugin_dir: str = "/usr/local/lib/criu"
    skip_in_flight: bool = False
    auto_dedup: bool = False
    lazy_pages: bool = False


@record
class Settings:
    """Everything the init takes from its environment; times in seconds."""

    mode: Mode
    checkpoint_id: str = ""
    signal_file: str = ""
    ready_file: str = ""
    location: str = ""
    store: str = "/checkpoints"
    marker_file: str = "/tmp/dynamo-restored"
    wait_for_checkpoint: bool = False
    wait_timeout: float = 300.0
    agent_timeout: float = 30.0
    on_failure: OnFailure = OnFailure.COLD
    block_io_uring: Block = Block.AUTO
    verify: Verify = Verify.FULL
    allow: tuple[str, ...] = ()
    debug: bool = False
    criu: CriuSettings = CriuSettings()

    @property
    def checkpoint_dir(self) -> str:
        """Where the container sees the checkpoint of this id."""
        return f"{self.store.rstrip('/')}/{self.checkpoint_id}"


def parse(environ: Mapping[str, str]) -> Settings:
    """Return what the environment asks for; raise `UsageError` for the first value that is wrong."""
    values = _Values(environ)
    if "DYN_CHECKPOINT_SIGNAL_FILE" in environ:
        return _checkpoint(values)
    if "DYN_CHECKPOINT_HASH" in environ:
        return _restore(values)
    return _settings(values, Mode.PLAIN)


def _checkpoint(values: _Values) -> Settings:
    for name in _REQUIRED_IN_CHECKPOINT:
        values.require(name)
    values.storage_type()
    checkpoint_id = values.checkpoint_id("DYN_CHECKPOINT_HASH")
    location = values.path("DYN_CHECKPOINT_LOCATION", "")
    if location.rstrip("/").rpartition("/")[2] != checkpoint_id:
        raise UsageError(
            Reason.ID_MISMATCH,
            f"DYN_CHECKPOINT_LOCATION is {location!r}, but DYN_CHECKPOINT_HASH is {checkpoint_id!r}.",
            cure="The last element of the location must be the id.",
        )
    if values.boolean("WAIT_FOR_CHECKPOINT", default=False):
        raise UsageError(
            Reason.BAD_VALUE,
            "WAIT_FOR_CHECKPOINT is set together with DYN_CHECKPOINT_SIGNAL_FILE, which means that this"
            " container is to be checkpointed and never restored.",
            cure="Remove one of the two.",
        )
    return _settings(
        values,
        Mode.CHECKPOINT,
        checkpoint_id=checkpoint_id,
        signal_file=values.path("DYN_CHECKPOINT_SIGNAL_FILE", ""),
        ready_file=values.path("DYN_CHECKPOINT_READY_FILE", ""),
        location=location,
    )


def _restore(values: _Values) -> Settings:
    values.storage_type()
    checkpoint_id = values.checkpoint_id("DYN_CHECKPOINT_HASH")
    return _settings(
        values,
        Mode.RESTORE,
        checkpoint_id=checkpoint_id,
        ready_file=values.path("DYN_CHECKPOINT_READY_FILE", ""),
        wait_for_checkpoint=values.boolean("WAIT_FOR_CHECKPOINT", default=False),
    )


def _settings(
    values: _Values,
    mode: Mode,
    *,
    checkpoint_id: str = "",
    signal_file: str = "",
    ready_file: str = "",
    location: str = "",
    wait_for_checkpoint: bool = False,
) -> Settings:
    ours = Settings(
        mode=mode,
        agent_timeout=values.seconds("CHREK_AGENT_TIMEOUT", 30.0),
        on_failure=OnFailure(values.choice("CHREK_ON_RESTORE_FAILURE", [item.value for item in OnFailure])),
        block_io_uring=values.block(),
        verify=Verify(values.choice("CHREK_VERIFY", [item.value for item in Verify])),
        allow=values.reasons("CHREK_ALLOW"),
    )
    if mode is Mode.PLAIN:
        return ours
    store = values.path("DYN_CHECKPOINT_PATH", "/checkpoints")
    return Settings(
        mode=mode,
        checkpoint_id=checkpoint_id,
        signal_file=signal_file,
        ready_file=ready_file,
        location=location,
        store=store,
        marker_file=values.path("DYN_RESTORE_MARKER_FILE", "/tmp/dynamo-restored"),
        wait_for_checkpoint=wait_for_checkpoint,
        wait_timeout=values.seconds("RESTORE_WAIT_TIMEOUT", 300.0),
        agent_timeout=ours.agent_timeout,
        on_failure=ours.on_failure,
        block_io_uring=ours.block_io_uring,
        verify=ours.verify,
        allow=ours.allow,
        debug=values.boolean("DEBUG", default=False),
        criu=_criu(values, f"{store.rstrip('/')}/{checkpoint_id}"),
    )


def _criu(values: _Values, checkpoint_dir: str) -> CriuSettings:
    work_dir = values.path("CRIU_WORK_DIR", "/tmp")
    if f"{work_dir.rstrip('/')}/".startswith(f"{checkpoint_dir}/"):
        raise values.bad("CRIU_WORK_DIR", "a directory outside the checkpoint, which a restore only reads")
    return CriuSettings(
        timeout=values.integer("CRIU_TIMEOUT", 0, maximum=2**31 - 1),
        log_level=values.integer("CRIU_LOG_LEVEL", 4, maximum=4),
        work_dir=work_dir,
        cuda_plugin_dir=values.path("CUDA_PLUGIN_DIR", "/usr/local/lib/criu"),
        skip_in_flight=values.boolean("CRIU_SKIP_IN_FLIGHT", default=False),
        auto_dedup=values.boolean("CRIU_AUTO_DEDUP", default=False),
        lazy_pages=values.boolean("CRIU_LAZY_PAGES", default=False),
    )


class _Values:
    """Typed reads of an environment; each raises `UsageError` with what is allowed."""

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
                cure=f"A checkpoint job needs all of {', '.join(_REQUIRED_IN_CHECKPOINT)}.",
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
