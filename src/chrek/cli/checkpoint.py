"""``chrek checkpoint ID``: save a running application, which runs on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Literal

import click

from chrek.cli import options
from chrek.cli.ending import explain
from chrek.errors import CaptureFailed, ChrekError, Reason

if TYPE_CHECKING:
    from types import FrameType

    from chrek.engine.capture import Outcome, Request
    from chrek.engine.progress import Progress
    from chrek.system.ids import HostPid


@click.command()
@options.id_argument
@click.option("--pid", type=click.IntRange(1), help="A process of the application, or its container's PID 1.")
@click.option("--container", metavar="ID", help="The runc container it runs in.")
@click.option("--stop", is_flag=True, help="Kill the application once the checkpoint is complete.")
@click.option(
    "--mode",
    type=click.Choice(["auto", "lazy", "plain"]),
    default="auto",
    show_default=True,
    help="lazy: ChReK copies the memory, with many threads; plain: CRIU does; auto: lazy where the limits allow it.",
)
@click.option(
    "--exclude", metavar="PATTERN", multiple=True, help="Files to leave out, like /var/cache/**; may be repeated."
)
@options.allow_option
@options.timeout_option
@options.store_option
@options.json_option
def command(
    *,
    checkpoint_id: str,
    pid: int | None,
    container: str | None,
    stop: bool,
    mode: Literal["auto", "lazy", "plain"],
    exclude: tuple[str, ...],
    allow: frozenset[Reason],
    timeout: float | None,
    store: str,
    as_json: bool,
) -> None:
    """Save the application that was started with this ID; it runs on.

    One that answers to another id, or to none, is named with --pid or --container. A checkpoint that exists is
    replaced, once the new one is complete. ^C undoes everything; the application is not harmed (exit code 170).
    """
    options.require_root("checkpoint")
    from chrek.cli import targets
    from chrek.criu.process import Settings
    from chrek.engine.capture import Request
    from chrek.engine.progress import Progress

    pid1 = targets.find(checkpoint_id, pid=pid, container=container)
    deadline = None if timeout is None else time.monotonic() + timeout
    with options.open_store(store, create=True) as opened:
        request = Request(
            pid1=pid1,
            store=opened,
            checkpoint_id=checkpoint_id,
            mode=mode,
            exclude=exclude,
            allow=allow,
            settings=Settings(timeout=0 if timeout is None else max(int(timeout + 0.5), 1)),
        )
        outcome = _capture(request, Progress(deadline=deadline), quiet=as_json)
    if stop:
        _kill(pid1)
    _show(outcome, stopped=stop, as_json=as_json)


def _capture(request: Request, progress: Progress, *, quiet: bool) -> Outcome:
    """Capture, and tell an application in checkpoint mode how it went."""
    from chrek.cli.progress import Meter
    from chrek.engine import signalfile
    from chrek.engine.capture import capture
    from chrek.engine.container import Container

    container = Container(request.pid1)
    location = container.environment.get("DYN_CHECKPOINT_LOCATION", f"{request.store.path}/{request.checkpoint_id}")
    try:
        meter = Meter(f"saving {request.checkpoint_id}", quiet=quiet, expected=_resident(request.pid1))
        with meter, _signals_cancel(progress):
            progress.listener = meter.listener
            outcome = capture(request, progress)
    except ChrekError as error:
        try:
            signalfile.write(container, signalfile.marker(request.checkpoint_id, path=location, error=error))
        except CaptureFailed as second:
            explain(second)  # the first is why there is no checkpoint
        raise
    try:
        signalfile.write(container, signalfile.marker(request.checkpoint_id, path=location))
    except CaptureFailed as error:
        message = f"The checkpoint {request.checkpoint_id!r} is complete, but: {error.message}"
        raise ChrekError(error.reason, message, cure=error.cure) from error
    return outcome


def _resident(pid1: HostPid) -> int:
    """Return the memory of everything below PID 1 in bytes: about what there is to save."""
    from chrek.system import procfs

    return sum(state.resident for pid in procfs.tree(pid1)[1:] if (state := procfs.status(pid)) is not None)


@contextmanager
def _signals_cancel(progress: Progress) -> Iterator[None]:
    """Let SIGINT and SIGTERM undo the capture rather than end this program in the middle of it."""

    def cancel(_: int, __: FrameType | None) -> None:
        progress.cancel.set()

    before = {number: signal.signal(number, cancel) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _kill(pid1: HostPid) -> None:
    """Kill the application at once, by its PID 1: what a process would still do in between is not in the checkpoint."""
    with suppress(ProcessLookupError):
        os.kill(pid1, signal.SIGKILL)


def _show(outcome: Outcome, *, stopped: bool, as_json: bool) -> None:
    from chrek.cli import output

    published = outcome.published
    if as_json:
        output.emit(
            {
                "id": published.checkpoint_id,
                "path": published.path,
                "generation": published.generation,
                "seconds": outcome.seconds,
                "frozen_seconds": outcome.frozen_seconds,
                "memory_bytes": outcome.memory_bytes,
                "stored_bytes": outcome.stored_bytes,
                "stopped": stopped,
                "phases": dict(outcome.phases),
                "warnings": list(outcome.warnings),
            }
        )
        return
    for warning in outcome.warnings:
        output.say(f"warning: {warning}")
    times = (
        f"{output.seconds(outcome.seconds)}, the application stood still for {output.seconds(outcome.frozen_seconds)}"
    )
    click.echo(f"{published.checkpoint_id}: {output.size(outcome.stored_bytes)} saved in {times}")
    click.echo(f"  {published.path}" + ("; the application was killed" if stopped else ""))
