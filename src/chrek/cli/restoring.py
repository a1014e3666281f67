"""Restore into a container whose init waits, as whoever stands outside does."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING

from chrek.cli import options
from chrek.cli.output import say, seconds, size
from chrek.cli.progress import Meter
from chrek.errors import ChrekError, Reason, Refused
from chrek.system.initstate import read_state

if TYPE_CHECKING:
    from chrek.engine.restore import Outcome
    from chrek.system.ids import HostPid
    from chrek.system.mailbox import Mailbox


def claim(pid1: HostPid, *, patience: float) -> Mailbox:
    """Wait, *patience* seconds at most, until an init waits, and claim its restore.

    Raises:
        Refused: ``CLAIM_LOST`` or ``APP_NOT_FOUND``; the init knows nothing of this.
    """
    from chrek.system.mailbox import Mailbox

    await_waiting(pid1, patience)
    return Mailbox.claim(pid1, by="chrek")


def restore_into(
    mailbox: Mailbox,
    pid1: HostPid,
    *,
    store: str,
    checkpoint_id: str,
    verify: str,
    allow: frozenset[Reason],
    deadline: float | None,
    quiet: bool,
) -> Outcome:
    """Restore into the container of a claimed init, hand over; say what is worth it.

    *deadline* is a `time.monotonic` value or None.

    Raises:
        ChrekError: it did not work; the init has been told, and starts cold or ends.
    """
    from chrek.criu.process import Settings
    from chrek.engine.progress import Progress
    from chrek.engine.restore import Request, restore
    from chrek.memory.fill import Verify

    left = 0 if deadline is None else max(int(deadline - time.monotonic() + 1), 1)
    try:
        with options.open_store(store) as opened, Meter(f"restoring {checkpoint_id}", quiet=quiet) as meter:
            request = Request(
                pid1=pid1,
                mailbox=mailbox,
                store=opened,
                checkpoint_id=checkpoint_id,
                verify=Verify(verify.lower()),
                allow=allow,
                settings=Settings(timeout=left),
            )
            outcome = restore(request, Progress(deadline=deadline, listener=meter.listener))
    except ChrekError as error:
        mailbox.failed(error.reason, error.message)
        raise
    except BaseException as error:
        mailbox.failed(Reason.RESTORE_FAILED, f"The restoring program failed: {error!r}.")
        raise
    if not quiet:
        said = f"{size(outcome.memory_bytes)} of memory in {seconds(outcome.seconds)}, verified: {verify.lower()}"
        say(f"restored {checkpoint_id}: {said}")
        for warning in outcome.warnings:
            say(f"warning: {warning}")
    return outcome


def await_waiting(pid1: HostPid, patience: float) -> None:
    """Wait until an init that has just been started waits for its restore.

    Raises:
        Refused: ``CLAIM_LOST``, when it does not.
    """
    until = time.monotonic() + patience
    while time.monotonic() < until:
        with suppress(Refused):  # not yet an init
            state = read_state(pid1)
            if state.mode != "starting":
                return
        time.sleep(0.005)  # what another process has at a descriptor gives no event
    raise Refused(Reason.CLAIM_LOST, f"Process {pid1} has not come to wait for a restore in {patience:.0f} s.")
