"""``chrek export ID DIR``: the format is open, and nobody needs ChReK to use a checkpoint."""

from __future__ import annotations

import shlex

import click

from chrek.cli import options, output


@click.command()
@options.id_argument
@click.argument("directory", type=click.Path())
@options.verify_option
@options.store_option
@options.json_option
def command(*, checkpoint_id: str, directory: str, verify: str, store: str, as_json: bool) -> None:
    """Write a checkpoint as an image directory that plain `criu restore` accepts.

    DIR is made, or is an empty directory. The memory shards become CRIU's page images again; archives of file
    changes are copied beside them, to be unpacked before the restore.
    """
    from chrek.artifact import Level
    from chrek.cli.progress import Meter
    from chrek.engine.export import export_checkpoint
    from chrek.store import open_checkpoint

    with (
        options.open_store(store) as opened,
        open_checkpoint(opened, checkpoint_id) as checkpoint,
        Meter(f"exporting {checkpoint_id}", quiet=as_json) as meter,
    ):
        done = export_checkpoint(checkpoint, directory, level=Level(verify.lower()), listener=meter.listener)
    if as_json:
        output.emit(
            {
                "id": checkpoint_id,
                "directory": directory,
                "memory_bytes": done.memory_bytes,
                "archives": list(done.archives),
                "restore_command": list(done.command),
            }
        )
        return
    click.echo(f"{checkpoint_id}: exported to {directory}, {output.size(done.memory_bytes)} of memory")
    for archive in done.archives:
        click.echo(f"  unpack {archive} before the restore (docs/format-files.md)")
    click.echo("Restore where the files are the same and the process ids are free, with the new streams open:")
    click.echo(f"  {shlex.join(done.command)}")
