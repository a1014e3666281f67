"""``chrek list``: what is in the store, broken checkpoints included, each with what is wrong with it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from chrek.cli import options, output

if TYPE_CHECKING:
    from chrek.store import Listed

_COMMAND_WIDTH = 50


@click.command()
@options.store_option
@options.json_option
def command(*, store: str, as_json: bool) -> None:
    """Show the checkpoints in the store.

    Only manifests are read; `chrek verify` reads everything. A broken checkpoint is listed with its problem.
    """
    from chrek.store import list_checkpoints

    with options.open_store(store) as opened:
        found = list_checkpoints(opened)
    if as_json:
        output.emit([_members(listed) for listed in found])
        return
    if not found:
        click.echo(f"No checkpoints in {store}.")
        return
    rows = [_row(listed) for listed in found if listed.summary is not None]
    if rows:
        header = ("ID", "TAKEN", "AGE", "MEMORY", "STORED", "PROCESSES", "PINNED", "COMMAND")
        click.echo(output.table(header, rows, right=(2, 3, 4, 5)))
    for listed in found:
        if listed.problem is not None:
            problem = listed.problem
            click.echo(f"{listed.checkpoint_id}: {problem.reason.code}: {output.clean(problem.message)}", err=True)


def _row(listed: Listed) -> tuple[str, ...]:
    summary = listed.summary
    assert summary is not None
    return (
        listed.checkpoint_id,
        output.moment(summary.created),
        output.seconds(max(time.time() - summary.created, 0)),
        output.size(summary.memory_bytes),
        output.size(summary.stored_bytes),
        str(summary.processes),
        "yes" if listed.pinned else "",
        output.short(output.command_line(summary.command), _COMMAND_WIDTH),
    )


def _members(listed: Listed) -> dict[str, object]:
    common: dict[str, object] = {"id": listed.checkpoint_id, "pinned": listed.pinned}
    if listed.problem is not None:
        return {**common, "problem": {"reason": listed.problem.reason.code, "message": listed.problem.message}}
    summary = listed.summary
    assert summary is not None
    return {
        **common,
        "created": summary.created,
        "memory_bytes": summary.memory_bytes,
        "stored_bytes": summary.stored_bytes,
        "files": summary.files,
        "processes": summary.processes,
        "command": list(summary.command),
        "host": summary.host,
        "image": summary.image,
    }
