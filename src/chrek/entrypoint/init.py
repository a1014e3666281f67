"""PID 1, step by step: check the environment, restore or start cold, supervise, end as the application ended."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found] # what `signal` wraps, without its enums: 3 ms
import os

from chrek.entrypoint import checkpointing, child
from chrek.entrypoint.environment import Mode, parse
from chrek.entrypoint.inherited import command, inherited
from chrek.entrypoint.report import Report
from chrek.entrypoint.signals import SIGCHLD, bit, block_all, open_signals
from chrek.entrypoint.steps import Container, cold, publish
from chrek.errors import ChrekError, Reason, UsageError
from chrek.system.initpublish import Publisher, high
from chrek.system.syscalls import prctl

TYPE_CHECKING = False  # see chrek.system.ids

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


USAGE = "usage: restore-entrypoint [--] COMMAND [ARGUMENT…]"


def main(arguments: Sequence[str], blocked: Iterable[int]) -> int:
    """Run the container's life; return its exit code. `blocked` is the signal mask of before."""
    given = inherited(_mask(blocked))
    report = Report(enabled=given.has_stderr)
    try:
        settings = parse(given.mapping())
        container = Container(
            settings=settings,
            inherited=given,
            arguments=_command(arguments),
            report=Report(enabled=given.has_stderr, debug=settings.debug),
            publisher=Publisher(),
            signals=_become_init(),
        )
        return _run(container)
    except ChrekError as error:
        report.ending(str(error))
        return int(error.exit_code)


def _run(container: Container) -> int:
    settings, report = container.settings, container.report
    publish(container, "starting")
    if settings.mode is Mode.CHECKPOINT:
        report.line(f"checkpoint mode ({settings.checkpoint_id}): nothing is restored in this container")
        if checkpointing.remove_stale(settings.signal_file):
            report.line(f"removed {settings.signal_file}, which an earlier container left")
    if settings.mode is Mode.RESTORE:
        from chrek.entrypoint.restoring import restore  # noqa: PLC0415 - a cold start need not pay for it

        return restore(container)
    code = cold(container, reason="")
    if settings.mode is Mode.CHECKPOINT and code == 0:
        failed = checkpointing.verdict(settings.signal_file)
        if failed is not None:
            report.ending(f"checkpoint failed: {failed[1]}")
            return int(failed[0])
    return code


def _become_init() -> int:
    """Take over what PID 1 must do; return the descriptor of all signals."""
    # Inherited as ignored, it would make the kernel throw the application's exit status away.
    _signal.signal(SIGCHLD, _signal.SIG_DFL)
    if os.getpid() != 1:
        prctl(child.PR_SET_CHILD_SUBREAPER, 1)
    descriptor = open_signals()
    try:
        return high(descriptor)
    finally:
        os.close(descriptor)


def _mask(blocked: Iterable[int]) -> int:
    """Return the signal mask of before as kernel bits; 32 and 33 are the C library's and still as they were."""
    hidden = block_all() & (bit(32) | bit(33))
    return sum({bit(number) for number in blocked}) | hidden


def _command(arguments: Sequence[str]) -> tuple[bytes, ...]:
    rest = arguments[1:] if arguments and arguments[0] == "--" else arguments
    if not arguments or not rest:
        raise UsageError(Reason.NO_COMMAND, f"No command to run; {USAGE}.")
    if rest is arguments and rest[0].startswith("-"):
        raise UsageError(Reason.BAD_VALUE, f"Unknown option {rest[0]!r}; {USAGE}.", cure="Options end with --.")
    return command(rest)
