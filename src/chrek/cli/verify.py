"""``chrek verify ID…``: every byte against the digests, on all cores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from chrek.cli import options, output
from chrek.cli.ending import Ended, explain
from chrek.errors import ChrekError, ExitCode

if TYPE_CHECKING:
    from chrek.artifact.verify import Report
    from chrek.store import Store


@click.command()
@click.argument("checkpoint_ids", metavar="[ID...]", type=options.ID, nargs=-1)
@click.option("--all", "every", is_flag=True, help="All checkpoints of the store.")
@click.option(
    "--level",
    type=click.Choice(["full", "sampled", "off"]),
    default="full",
    show_default=True,
    help="How much of the bulk data is read; small files, sizes and types always are.",
)
@click.option("--workers", metavar="N", type=click.IntRange(1), help="Threads.  [default: one a processor]")
@options.store_option
@options.json_option
def command(
    *, checkpoint_ids: tuple[str, ...], every: bool, level: str, workers: int | None, store: str, as_json: bool
) -> None:
    """Compare checkpoints with their digests and show every difference.

    Exit code 172 when one is damaged or cannot be read.
    """
    from chrek.store import list_checkpoints

    if every == bool(checkpoint_ids):
        raise click.UsageError("Name the checkpoints to verify, or give --all.", click.get_current_context())
    with options.open_store(store) as opened:
        ids = [listed.checkpoint_id for listed in list_checkpoints(opened)] if every else list(checkpoint_ids)
        results = [
            _verify(opened, checkpoint_id, level, workers, quiet=as_json) for checkpoint_id in dict.fromkeys(ids)
        ]
    if as_json:
        output.emit(results)
    if not all(result["ok"] for result in results):
        raise Ended(int(ExitCode.REFUSED))


def _verify(store: Store, checkpoint_id: str, level: str, workers: int | None, *, quiet: bool) -> dict[str, object]:
    from chrek.artifact import Level
    from chrek.cli.progress import Meter
    from chrek.memory.index import INDEX_NAME
    from chrek.memory.index import decode as decode_index
    from chrek.store import open_checkpoint

    try:
        with (
            open_checkpoint(store, checkpoint_id) as checkpoint,
            Meter(f"verifying {checkpoint_id}", quiet=quiet) as meter,
        ):
            report = checkpoint.verify(
                Level(level), workers=workers, progress=lambda done, total: meter.listen("reading", done, total)
            )
            if report.ok and f"memory/{INDEX_NAME}" in checkpoint.manifest.files:
                decode_index(checkpoint.read(f"memory/{INDEX_NAME}", limit=1 << 30))
    except ChrekError as error:
        if not quiet:
            click.echo(f"{checkpoint_id}: not usable")
            explain(error)
        problem = {"path": ".", "text": f"{error.reason.code}: {error.message}"}
        return {"id": checkpoint_id, "ok": False, "problems": [problem]}
    if not quiet:
        _show(checkpoint_id, report)
    problems = [{"path": problem.path, "text": problem.text} for problem in report.problems]
    return {
        "id": checkpoint_id,
        "ok": report.ok,
        "level": level,
        "files": report.files,
        "bytes_read": report.bytes_read,
        "seconds": report.seconds,
        "problems": problems,
    }


def _show(checkpoint_id: str, report: Report) -> None:
    rate = output.size(report.bytes_read / max(report.seconds, 1e-6))
    read = f"{report.files} files, {output.size(report.bytes_read)} in {output.seconds(report.seconds)} ({rate}/s)"
    if report.ok:
        click.echo(f"{checkpoint_id}: ok; {read}, level {report.level.value}")
        return
    click.echo(f"{checkpoint_id}: damaged; {len(report.problems)} differences; {read}")
    for problem in report.problems:
        click.echo(f"  {output.clean(str(problem))}")
