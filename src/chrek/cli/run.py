"""``chrek run --id ID -- COMMAND…``: restore if there is a valid checkpoint, else start cold.

The application runs in the foreground under ChReK's init, so that `chrek checkpoint ID` can save it at any
time. The init waits for a restore as it does in a container, and this program restores from outside, as a
node's agent does there; when that fails the init starts the command cold, or ends with 171.
"""

from __future__ import annotations

import click

from chrek.cli import options
from chrek.errors import Reason


@click.command(context_settings={"allow_interspersed_args": False})  # the rest is the command, with or without --
@click.option("--id", "checkpoint_id", required=True, type=options.ID, help="Id of the checkpoint.")
@click.option("--cold", is_flag=True, help="Do not look for a checkpoint.")
@click.option(
    "--on-failure",
    envvar="CHREK_ON_RESTORE_FAILURE",
    show_envvar=True,
    type=click.Choice(["cold", "fail"], case_sensitive=False),
    default="cold",
    show_default=True,
    help="What follows a restore that fails: a cold start, or exit code 171.",
)
@options.verify_option
@options.allow_option
@options.timeout_option
@options.store_option
@options.json_option
@click.argument("arguments", metavar="-- COMMAND...", nargs=-1, type=click.UNPROCESSED)
def command(
    *,
    checkpoint_id: str,
    cold: bool,
    on_failure: str,
    verify: str,
    allow: frozenset[Reason],
    timeout: float | None,
    store: str,
    as_json: bool,
    arguments: tuple[str, ...],
) -> None:
    """Start an application: from its checkpoint ID if there is one, else cold.

    It runs in the foreground, in a PID, a mount and an IPC namespace of its own, on this machine's files and
    network, with /dev/shm private to it. `chrek checkpoint ID` saves it. The exit code is the application's own,
    128+n for a signal.
    """
    from chrek.cli.starting import Start, start

    start(
        Start(
            verb="run",
            checkpoint_id=checkpoint_id,
            arguments=arguments,
            store=store,
            restore="no" if cold else "if possible",
            on_failure="fail" if on_failure == "fail" else "cold",
            verify=verify,
            allow=allow,
            timeout=timeout,
            as_json=as_json,
        )
    )
