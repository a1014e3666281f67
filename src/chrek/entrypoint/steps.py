"""What every way through PID 1's life shares: the cold start, and the state that is published for those outside."""

from __future__ import annotations

import os

from chrek.entrypoint import child
from chrek.entrypoint.environment import Settings
from chrek.entrypoint.inherited import Inherited
from chrek.entrypoint.report import Report, age
from chrek.entrypoint.supervise import exit_code, supervise
from chrek.entrypoint.terminal import controlling_terminal, let_go
from chrek.entrypoint.values import Block
from chrek.system.initpublish import InitState, Publisher, process
from chrek.system.record import record
from chrek.system.seccomp import changes_nothing_else


@record
class Container:
    """What all steps share."""

    settings: Settings
    inherited: Inherited
    arguments: tuple[bytes, ...]
    report: Report
    publisher: Publisher
    signals: int


def cold(container: Container, *, reason: str) -> int:
    """Start the original command and supervise it; return the exit code.

    `reason` is why it was not restored, empty when nothing asked for that.
    """
    settings, report = container.settings, container.report
    terminal = controlling_terminal()
    if terminal is not None:
        let_go(terminal)
    block = _block_io_uring(container)
    plan = child.Plan(
        arguments=container.arguments,
        inherited=container.inherited,
        terminal=terminal,
        block_io_uring=block,
        set_no_new_privs=settings.block_io_uring is Block.TRUE,
    )
    try:
        application = child.start(plan)
    except child.ExecFailed as error:
        report.ending(str(error))
        return error.code
    seconds = age()
    report.started("cold", reason or "none", seconds)
    publish(container, "cold", application=application, reason=reason, seconds=seconds)
    return exit_code(supervise(application, container.signals))


def publish(
    container: Container,
    mode: str,
    *,
    application: int | None = None,
    claim: str = "",
    mailbox: int | None = None,
    deadline: float | None = None,
    reason: str = "",
    seconds: float | None = None,
) -> None:
    """Publish a state; without one the application runs all the same, and cannot be checkpointed."""
    try:
        container.publisher.publish(
            InitState(
                mode=mode,
                init=process(os.getpid()),
                app=None if application is None else process(application),
                checkpoint_id=container.settings.checkpoint_id,
                mailbox=mailbox,
                claim=claim,
                deadline=deadline,
                reason=reason,
                seconds=seconds,
            )
        )
    except OSError as error:
        container.report.line(f"cannot publish the init's state, so no checkpoint can be taken: {error}")


def _block_io_uring(container: Container) -> bool:
    wish = container.settings.block_io_uring
    if wish is not Block.AUTO:
        return wish is Block.TRUE
    possible = changes_nothing_else(container.inherited.capabilities)
    if not possible:
        container.report.debug("io_uring and MPTCP are not hidden: neither no_new_privs nor CAP_SYS_ADMIN here")
    return possible
