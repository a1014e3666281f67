"""``chrek unpin ID…``: let garbage collection have checkpoints again."""

from __future__ import annotations

import click

from chrek.cli import options, output


@click.command()
@options.ids_argument
@options.store_option
@options.json_option
def command(*, checkpoint_ids: tuple[str, ...], store: str, as_json: bool) -> None:
    """Let garbage collection have checkpoints again. One that was not pinned is no error."""
    from chrek.store import unpin

    with options.open_store(store) as opened:
        for checkpoint_id in checkpoint_ids:
            unpin(opened, checkpoint_id)
    if as_json:
        output.emit({"unpinned": list(checkpoint_ids)})
    else:
        for checkpoint_id in checkpoint_ids:
            click.echo(f"{checkpoint_id}: not pinned")
