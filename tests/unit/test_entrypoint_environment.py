"""Every variable of the container's environment: what is taken, what is refused, and how it is said."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chrek.entrypoint.environment import Mode, OnFailure, Settings, Verify, parse
from chrek.entrypoint.values import Block
from chrek.errors import Reason, UsageError

JOB = {
    "DYN_CHECKPOINT_SIGNAL_FILE": "/checkpoint-signal/a.done",
    "DYN_CHECKPOINT_READY_FILE": "/tmp/ready",
    "DYN_CHECKPOINT_HASH": "abc123",
    "DYN_CHECKPOINT_LOCATION": "/checkpoints/abc123",
    "DYN_CHECKPOINT_STORAGE_TYPE": "pvc",
}
POD = {"DYN_CHECKPOINT_HASH": "abc123", "DYN_CHECKPOINT_PATH": "/checkpoints"}


def error(environ: dict[str, str]) -> UsageError:
    """Return the error that an environment gives."""
    with pytest.raises(UsageError) as caught:
        parse(environ)
    return caught.value


def test_an_empty_environment_is_plain() -> None:
    """Without ChReK's variables nothing is asked for."""
    assert parse({}) == Settings(mode=Mode.PLAIN)


def test_a_signal_file_means_checkpoint_mode() -> None:
    """All five variables of a job are taken over."""
    settings = parse(JOB)
    assert settings.mode is Mode.CHECKPOINT
    assert settings.checkpoint_id == "abc123"
    assert settings.signal_file == "/checkpoint-signal/a.done"
    assert settings.ready_file == "/tmp/ready"
    assert settings.location == "/checkpoints/abc123"


def test_a_signal_file_wins_over_a_path() -> None:
    """A rerun job never restores itself, whatever else is set."""
    assert parse({**JOB, **POD}).mode is Mode.CHECKPOINT


def test_an_id_alone_means_restore_mode() -> None:
    """The defaults of a restore are the documented ones."""
    settings = parse({"DYN_CHECKPOINT_HASH": "abc123"})
    assert settings == Settings(mode=Mode.RESTORE, checkpoint_id="abc123")
    assert settings.checkpoint_dir == "/checkpoints/abc123"
    assert settings.marker_file == "/tmp/dynamo-restored"
    assert (settings.wait_timeout, settings.agent_timeout) == (300, 30)
    assert (settings.criu.timeout, settings.criu.log_level, settings.criu.work_dir) == (0, 4, "/tmp")


@pytest.mark.parametrize("name", [name for name in JOB if name != "DYN_CHECKPOINT_SIGNAL_FILE"])
def test_each_of_the_five_is_required(name: str) -> None:
    """A job without one of the five is refused, naming it."""
    found = error({key: value for key, value in JOB.items() if key != name})
    assert found.reason is Reason.BAD_VALUE
    assert name in found.message


BOOLEANS = ["WAIT_FOR_CHECKPOINT", "DEBUG", "CRIU_SKIP_IN_FLIGHT", "CRIU_AUTO_DEDUP", "CRIU_LAZY_PAGES"]
BAD = [
    *((name, value) for name in BOOLEANS for value in ("", "2", "maybe", "TRUE ", "tru", "ja", "\udcff")),
    *(("CRIU_TIMEOUT", value) for value in ("", "-1", "1.5", "ten", "1e3", "٣", "99999999999999999999", " 1")),
    *(("CRIU_LOG_LEVEL", value) for value in ("", "5", "-1", "high")),
    *(("RESTORE_WAIT_TIMEOUT", value) for value in ("", "-1", "inf", "nan", "1.", ".5", "300s")),
    *(("CHREK_AGENT_TIMEOUT", value) for value in ("", "-1", "never")),
    *(("CHREK_ON_RESTORE_FAILURE", value) for value in ("", "warm")),
    *(("CHREK_BLOCK_IO_URING", value) for value in ("", "maybe")),
    *(("CHREK_VERIFY", value) for value in ("", "half")),
    *(("CHREK_ALLOW", value) for value in ("NO_SUCH_CODE", "BAD_ID,,", "bad_id")),
    *(("DYN_CHECKPOINT_PATH", value) for value in ("", "checkpoints", "/a/../b")),
    *(("DYN_RESTORE_MARKER_FILE", value) for value in ("", "marker")),
    *(("CRIU_WORK_DIR", value) for value in ("", "tmp", "/checkpoints/abc123", "/checkpoints/abc123/x")),
    *(("CUDA_PLUGIN_DIR", value) for value in ("", "lib")),
    *(("DYN_CHECKPOINT_STORAGE_TYPE", value) for value in ("", "s3", "oci", "PVC", "nfs")),
    *(("DYN_CHECKPOINT_HASH", value) for value in ("", ".a", "-a", "a/b", "a b", "ä", "x" * 64, "a\n", "..")),
    *(("DYN_CHECKPOINT_READY_FILE", value) for value in ("", "ready")),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_names_variable_value_and_what_is_allowed(name: str, value: str) -> None:
    """Each value that is not allowed is refused with all three."""
    found = error({**POD, name: value})
    assert found.exit_code == 2
    assert found.message == f"{name} is {value!r}." or name in found.message
    assert found.cure.startswith("Allowed: ")


@pytest.mark.parametrize("name", ["DYN_CHECKPOINT_SIGNAL_FILE", "DYN_CHECKPOINT_LOCATION", "DYN_CHECKPOINT_READY_FILE"])
def test_paths_of_a_job_are_absolute(name: str) -> None:
    """A relative path of a job is refused."""
    assert name in error({**JOB, name: "abc123"}).message


def test_reserved_storage_types_say_so() -> None:
    """S3 and oci are refused as not existing yet."""
    assert "do not exist yet" in error({**JOB, "DYN_CHECKPOINT_STORAGE_TYPE": "s3"}).cure


def test_location_and_id_must_agree() -> None:
    """A location of another id is refused, showing both."""
    found = error({**JOB, "DYN_CHECKPOINT_LOCATION": "/checkpoints/other"})
    assert found.reason is Reason.ID_MISMATCH
    assert "other" in found.message
    assert "abc123" in found.message


def test_a_location_may_end_in_a_slash() -> None:
    """The last element counts."""
    assert parse({**JOB, "DYN_CHECKPOINT_LOCATION": "/checkpoints/abc123/"}).checkpoint_id == "abc123"


def test_waiting_in_a_job_is_refused() -> None:
    """A container cannot both be checkpointed and wait for its checkpoint."""
    assert "WAIT_FOR_CHECKPOINT" in error({**JOB, "WAIT_FOR_CHECKPOINT": "true"}).message
    assert parse({**JOB, "WAIT_FOR_CHECKPOINT": "false"}).mode is Mode.CHECKPOINT


@pytest.mark.parametrize("value", ["1", "true", "yes", "on", "TRUE", "Yes", "oN"])
def test_true_in_any_case(value: str) -> None:
    """Four words and any case mean true."""
    assert parse({**POD, "WAIT_FOR_CHECKPOINT": value}).wait_for_checkpoint
    assert parse({"CHREK_BLOCK_IO_URING": value}).block_io_uring is Block.TRUE


@pytest.mark.parametrize("value", ["0", "false", "no", "off", "FALSE", "Off"])
def test_false_in_any_case(value: str) -> None:
    """Four words and any case mean false."""
    assert not parse({**POD, "DEBUG": value}).debug
    assert parse({"CHREK_BLOCK_IO_URING": value}).block_io_uring is Block.FALSE


def test_every_knob_arrives() -> None:
    """No variable is read and dropped."""
    settings = parse(
        {
            **POD,
            "DYN_CHECKPOINT_PATH": "/store/",
            "DYN_RESTORE_MARKER_FILE": "/m",
            "CRIU_TIMEOUT": "7",
            "CRIU_LOG_LEVEL": "2",
            "CRIU_WORK_DIR": "/var/tmp",
            "CUDA_PLUGIN_DIR": "/plug",
            "CRIU_SKIP_IN_FLIGHT": "on",
            "CRIU_AUTO_DEDUP": "yes",
            "CRIU_LAZY_PAGES": "1",
            "WAIT_FOR_CHECKPOINT": "true",
            "RESTORE_WAIT_TIMEOUT": "12.5",
            "DEBUG": "1",
            "CHREK_ON_RESTORE_FAILURE": "Fail",
            "CHREK_AGENT_TIMEOUT": "0",
            "CHREK_VERIFY": "sampled",
            "CHREK_ALLOW": "SYSV_IPC_IN_USE, CPU_MISMATCH",
        }
    )
    assert settings.checkpoint_dir == "/store/abc123"
    assert settings.marker_file == "/m"
    assert (settings.criu.timeout, settings.criu.log_level) == (7, 2)
    assert (settings.criu.work_dir, settings.criu.cuda_plugin_dir) == ("/var/tmp", "/plug")
    assert (settings.criu.skip_in_flight, settings.criu.auto_dedup, settings.criu.lazy_pages) == (True, True, True)
    assert (settings.wait_for_checkpoint, settings.wait_timeout, settings.debug) == (True, 12.5, True)
    assert (settings.on_failure, settings.agent_timeout) == (OnFailure.FAIL, 0)
    assert settings.verify is Verify.SAMPLED
    assert settings.allow == ("SYSV_IPC_IN_USE", "CPU_MISMATCH")


def test_names_of_others_are_not_looked_at_in_a_plain_container() -> None:
    """DEBUG and the like belong to the application where ChReK has nothing to do."""
    assert parse({"DEBUG": "express:*", "CRIU_TIMEOUT": "soon"}).mode is Mode.PLAIN


def test_our_own_names_are_checked_in_a_plain_container() -> None:
    """A misspelt CHREK_ value is an error everywhere."""
    assert "CHREK_BLOCK_IO_URING" in error({"CHREK_BLOCK_IO_URING": "ture"}).message


def test_settings_cannot_be_changed() -> None:
    """The result is a frozen value."""
    with pytest.raises(AttributeError):
        parse({}).mode = Mode.RESTORE  # type: ignore[misc]


@given(st.text())
def test_an_id_is_valid_or_refused(text: str) -> None:
    """Whatever stands in DYN_CHECKPOINT_HASH, an accepted id is a safe directory name."""
    try:
        accepted = parse({"DYN_CHECKPOINT_HASH": text}).checkpoint_id
    except UsageError as found:
        reason = found.reason
    else:
        _check_id(accepted, text)
        return
    assert reason is Reason.BAD_ID


def _check_id(accepted: str, text: str) -> None:
    assert accepted == text
    assert text.isascii()
    assert "/" not in text
    assert not text.startswith(".")
    assert 0 < len(text) < 64


@given(st.dictionaries(st.sampled_from([*JOB, *POD, *BOOLEANS, "CRIU_TIMEOUT", "CHREK_ALLOW"]), st.text()))
def test_nothing_but_a_usage_error_is_raised(environ: dict[str, str]) -> None:
    """No environment makes the init crash."""
    with contextlib.suppress(UsageError):
        parse(environ)
