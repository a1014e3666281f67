"""What people and programs read: tables, sizes, times, JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence

import click

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def size(count: float) -> str:
    """Return a number of bytes as people read it: 512 B, 1.5 GiB."""
    unit = 0
    while count >= 1023.95 and unit < len(_UNITS) - 1:
        count /= 1024
        unit += 1
    return f"{count:.0f} B" if unit == 0 else f"{count:.1f} {_UNITS[unit]}"


def seconds(value: float) -> str:
    """Return a duration: 0.12 s, 4.5 s, 3 min 20 s, 5 h, 12 d."""
    if value < 60:
        return f"{value:.2f} s" if value < 1 else f"{value:.1f} s"
    if value < 3600:
        return f"{int(value // 60)} min {int(value % 60)} s"
    return f"{value / 3600:.0f} h" if value < 48 * 3600 else f"{value / 86400:.0f} d"


def moment(unix: float) -> str:
    """Return a Unix time as local date and time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix))


def clean(text: str) -> str:
    """Return text without characters that a terminal would act on: command lines may have any."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def command_line(arguments: Sequence[str]) -> str:
    """Return a command as it could be typed, without control characters."""
    import shlex

    return clean(shlex.join(arguments))


def short(text: str, width: int) -> str:
    """Return text cut to a width."""
    return text if len(text) <= width else text[: width - 1] + "…"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[int] = ()) -> str:
    """Return columns lined up; those whose numbers are in *right* on their right edge."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    to_right = set(right)

    def row(line: list[str]) -> str:
        cells = [
            cell.rjust(width) if column in to_right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join(map(row, lines))


def emit(value: object) -> None:
    """Write a result as JSON."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=True))


def say(text: str) -> None:
    """Write a line for people on standard error: standard output is for results."""
    click.echo(f"chrek: {clean(text)}", err=True)
