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

from chrek.entrypoint.values import REQUIRED_IN_CHECKPOINT, Block, Values
from chrek.errors import Reason, UsageError
from chrek.system.record import record

TYPE_CHECKING = False  # see chrek.system.ids

if TYPE_CHECKING:
    from collections.abc import Mapping


class Mode(Enum):
    """What the container is for."""

    CHECKPOINT = "checkpoint"
    RESTORE = "restore"
    PLAIN = "plain"


class OnFailure(Enum):
    """What follows a failed restore: a cold start, or exit code 171."""

    COLD = "cold"
    FAIL = "fail"


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
    values = Values(environ)
    if "DYN_CHECKPOINT_SIGNAL_FILE" in environ:
        return _checkpoint(values)
    if "DYN_CHECKPOINT_HASH" in environ:
        return _restore(values)
    return _settings(values, Mode.PLAIN)


def _checkpoint(values: Values) -> Settings:
    for name in REQUIRED_IN_CHECKPOINT:
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


def _restore(values: Values) -> Settings:
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
    values: Values,
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


def _criu(values: Values, checkpoint_dir: str) -> CriuSettings:
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
