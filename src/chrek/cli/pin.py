"""``chrek pin ID…``: keep checkpoints from garbage collection."""

from __future__ import annotations

import click

from chrek.cli import options, output


@click.command()
@options.ids_argument
@options.store_option
@options.json_option
def command(*, checkpoint_ids: tuple[str, ...], store: str, as_json: bool) -> None:
    """Keep checkpoints from garbage collection, also those of these ids that do not exist yet."""
    from chrek.store import pin

    with options.open_store(store) as opened:
        for checkpoint_id in checkpoint_ids:
            pin(opened, checkpoint_id)
    if as_json:
        output.emit({"pinned": list(checkpoint_ids)})
    else:
        for checkpoint_id in checkpoint_ids:
            click.echo(f"{checkpoint_id}: pinned")
