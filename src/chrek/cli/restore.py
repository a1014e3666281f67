"""``chrek restore ID``: into a container that waits, or a new start on this machine.

Unlike `run` it never starts cold by itself: there must be a checkpoint, and it must work.
"""

from __future__ import annotations

import click

from chrek.cli import options
from chrek.errors import Reason, UsageError


@click.command()
@options.id_argument
@click.option(
    "--pid", type=click.IntRange(1), help="PID 1 of the container whose init waits, as this machine numbers it."
)
@click.option("--container", metavar="ID", help="The runc container whose init waits.")
@options.verify_option
@options.allow_option
@options.timeout_option
@options.store_option
@options.json_option
@click.argument("arguments", metavar="[-- COMMAND...]", nargs=-1, type=click.UNPROCESSED)
def command(
    *,
    checkpoint_id: str,
    pid: int | None,
    container: str | None,
    verify: str,
    allow: frozenset[Reason],
    timeout: float | None,
    store: str,
    as_json: bool,
    arguments: tuple[str, ...],
) -> None:
    """Bring the application of checkpoint ID back.

    With a command it runs here, in the foreground, as `chrek run` does it; the command itself is what the init
    would start cold, and is not run. Without one the restore goes into the container that waits for it: the only
    one of this id, or the one that --pid or --container names.
    """
    if arguments:
        if pid is not None or container is not None:
            message = "A command starts an application here; --pid and --container name one that waits."
            raise UsageError(Reason.BAD_VALUE, message, cure="Give one or the other.")
        from chrek.cli.starting import Start, start

        start(
            Start(
                verb="restore",
                checkpoint_id=checkpoint_id,
                arguments=arguments,
                store=store,
                restore="must",
                on_failure="fail",
                verify=verify,
                allow=allow,
                timeout=timeout,
                as_json=as_json,
            )
        )
    options.require_root("restore")
    _into_waiting(
        checkpoint_id=checkpoint_id,
        pid=pid,
        container=container,
        verify=verify,
        allow=allow,
        timeout=timeout,
        store=store,
        as_json=as_json,
    )


def _into_waiting(
    *,
    checkpoint_id: str,
    pid: int | None,
    container: str | None,
    verify: str,
    allow: frozenset[Reason],
    timeout: float | None,
    store: str,
    as_json: bool,
) -> None:
    import time

    from chrek.cli import output, targets
    from chrek.cli.restoring import claim, restore_into

    pid1 = targets.find_waiting(checkpoint_id, pid=pid, container=container)
    with claim(pid1, patience=5.0) as mailbox:
        outcome = restore_into(
            mailbox,
            pid1,
            store=store,
            checkpoint_id=checkpoint_id,
            verify=verify,
            allow=allow,
            deadline=None if timeout is None else time.monotonic() + timeout,
            quiet=as_json,
        )
    if as_json:
        output.emit(
            {
                "id": checkpoint_id,
                "pid1": pid1,
                "root_pid": outcome.root,
                "seconds": outcome.seconds,
                "memory_bytes": outcome.memory_bytes,
                "verified": verify.lower(),
                "phases": dict(outcome.phases),
                "warnings": list(outcome.warnings),
            }
        )
