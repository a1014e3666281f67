"""``chrek gc``: delete what is past a limit, and what killed captures left behind."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from chrek.cli import options, output
from chrek.cli.amounts import Duration, Size
from chrek.cli.ending import Ended
from chrek.errors import ExitCode

if TYPE_CHECKING:
    from chrek.store import Action, Plan

_DOING = {"delete": "delete", "purge": "empty from the trash", "clean": "clean up after"}


@click.command()
@click.option("--max-age", metavar="TIME", type=Duration(), help="Delete what is older: 30m, 12h, 7d.")
@click.option("--max-count", metavar="N", type=click.IntRange(0), help="Keep at most so many checkpoints, the newest.")
@click.option("--max-bytes", metavar="SIZE", type=Size(), help="Keep at most so much in all: 500M, 20G.")
@click.option(
    "--grace",
    metavar="TIME",
    type=Duration(),
    default=3600.0,
    show_default="1h",
    help="How long the trash keeps what readers may still have open.",
)
@click.option("--keep", metavar="ID", multiple=True, type=options.ID, help="An id that stays; may be repeated.")
@click.option("--ignore-pods", is_flag=True, help="Do not ask the cluster which ids its pods need.")
@click.option(
    "--kubeconfig",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Way into the cluster outside a pod.",
)
@click.option("--dry-run", is_flag=True, help="Only show what would go, and why.")
@options.store_option
@options.json_option
def command(
    *,
    max_age: float | None,
    max_count: int | None,
    max_bytes: int | None,
    grace: float,
    keep: tuple[str, ...],
    ignore_pods: bool,
    kubeconfig: Path | None,
    dry_run: bool,
    store: str,
    as_json: bool,
) -> None:
    """Delete checkpoints past a limit, the oldest first, and what killed captures left.

    Without a limit no checkpoint is deleted. What is deleted waits in the trash for the grace period. Pinned, kept
    and broken checkpoints stay; so do those that another process is writing, and what is not ChReK's. Ids of
    applications that run or wait on this machine are kept too, and in a cluster those that pods name which have not ended.
    """
    from chrek.cli import podsuse, targets
    from chrek.store import Policy, collect, plan

    in_use = {*keep, *(found.checkpoint_id for found in targets.every() if found.checkpoint_id)}
    # What is only cleaned up after nobody can need: no cluster is asked for that.
    if not ignore_pods and (max_age, max_count, max_bytes) != (None, None, None):
        in_use |= podsuse.in_use(kubeconfig)
    policy = Policy(max_age=max_age, max_count=max_count, max_bytes=max_bytes, grace=grace)
    with options.open_store(store) as opened:
        todo = plan(opened, policy, in_use=in_use)
        outcomes = () if dry_run else collect(opened, todo, in_use=in_use)
    skipped = {(outcome.action.what, outcome.action.name): outcome.skipped for outcome in outcomes if outcome.skipped}
    results = [(action, skipped.get((action.what, action.name))) for action in todo.actions]
    if as_json:
        output.emit(_members(todo, results, dry_run=dry_run))
    else:
        _show(todo, results, dry_run=dry_run)
    if skipped:
        raise Ended(int(ExitCode.FAILED))


def _show(todo: Plan, results: list[tuple[Action, str | None]], *, dry_run: bool) -> None:
    would = "would " if dry_run else ""
    for action, reason in results:
        line = f"{would}{_DOING[action.what.value]} {action.name} ({output.size(action.size)}): {action.why}"
        click.echo(line if reason is None else f"not done: {line}: {reason}")
    for kept in todo.kept:
        click.echo(f"keep {kept.checkpoint_id}: {output.clean(kept.why)}")
    freed = sum(action.size for action, reason in results if reason is None and action.what.value != "delete")
    trashed = sum(action.size for action, reason in results if reason is None and action.what.value == "delete")
    verb = "would be" if dry_run else "were"
    click.echo(f"{output.size(freed)} {verb} freed, {output.size(trashed)} moved to the trash")


def _members(todo: Plan, results: list[tuple[Action, str | None]], *, dry_run: bool) -> dict[str, object]:
    actions = [
        {"what": action.what.value, "name": action.name, "bytes": action.size, "why": action.why, "skipped": reason}
        for action, reason in results
    ]
    kept = [{"id": item.checkpoint_id, "why": item.why} for item in todo.kept]
    return {"dry_run": dry_run, "actions": actions, "kept": kept}
