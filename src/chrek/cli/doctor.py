"""``chrek doctor``: everything a machine needs, each line ok, warning or missing with the cure."""

from __future__ import annotations

import click

from chrek.cli import options, output
from chrek.cli.ending import Ended
from chrek.errors import ExitCode

_COLOURS = {"ok": "green", "warning": "yellow", "missing": "red"}


@click.command()
@options.store_option
@options.json_option
def command(*, store: str, as_json: bool) -> None:
    """Say what this machine has and lacks, and what to do about it.

    Exit code 1 when something is missing without which captures or restores fail; a warning is no failure.
    """
    from chrek.engine.doctor import Level, examine

    findings = []
    for finding in examine(store):
        findings.append(finding)
        if not as_json:
            level = click.style(f"{finding.level.value:<8}", fg=_COLOURS[finding.level.value])
            click.echo(f"{level}{finding.name}: {output.clean(finding.text)}")
            if finding.cure:
                click.echo(f"          {output.clean(finding.cure)}")
    missing = sum(finding.level is Level.MISSING for finding in findings)
    if as_json:
        lines = [
            {"name": finding.name, "level": finding.level.value, "text": finding.text, "cure": finding.cure}
            for finding in findings
        ]
        output.emit({"ok": not missing, "findings": lines})
    elif missing:
        click.echo(f"{missing} required {'thing is' if missing == 1 else 'things are'} missing.")
    if missing:
        raise Ended(int(ExitCode.FAILED))
