"""``chrek delete ID…``: to the trash, from which garbage collection removes it after a while."""

from __future__ import annotations

import sys

import click

from chrek.cli import options, output
from chrek.cli.ending import Ended, explain
from chrek.errors import ChrekError


@click.command()
@options.ids_argument
@click.option("--yes", is_flag=True, help="Do not ask.")
@options.store_option
@options.json_option
def command(*, checkpoint_ids: tuple[str, ...], yes: bool, store: str, as_json: bool) -> None:
    """Delete checkpoints, whole or broken.

    Whoever is restoring from one just now can finish; the disk space comes back with `chrek gc`, an hour later.
    A pinned checkpoint is deleted as well: pins are against garbage collection.
    """
    from chrek.store import delete

    if not yes and not as_json and sys.stdin.isatty():
        click.confirm(f"Delete {', '.join(checkpoint_ids)}?", abort=True, err=True)
    code = 0
    deleted = []
    with options.open_store(store) as opened:
        for checkpoint_id in dict.fromkeys(checkpoint_ids):
            try:
                delete(opened, checkpoint_id)
                deleted.append(checkpoint_id)
            except ChrekError as error:
                explain(error)
                code = code or int(error.exit_code)
    if as_json:
        output.emit({"deleted": deleted})
    else:
        for checkpoint_id in deleted:
            click.echo(f"{checkpoint_id}: deleted")
    if code:
        raise Ended(code)
