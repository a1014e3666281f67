"""Ages and sizes as people write them on a command line."""

from __future__ import annotations

import re

import click

_TIMES = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_SIZES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class Duration(click.ParamType[float]):
    """Seconds, or a number with a unit: 90, 30m, 12h, 7d, 2w."""

    name = "time"

    def convert(self, value: str | float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return seconds."""
        if isinstance(value, (int, float)):
            return float(value)
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw]?)", value.strip(), re.ASCII)
        if match is None:
            self.fail(f"{value!r} is no time; allowed are seconds, or 30m, 12h, 7d, 2w.", param, ctx)
        return float(match[1]) * _TIMES[match[2] or "s"]


class Size(click.ParamType[int]):
    """Bytes, or a number with a unit of 1024: 500M, 20G, 1.5T (also GiB)."""

    name = "size"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return bytes."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", value.strip(), re.ASCII | re.IGNORECASE)
        if match is None:
            self.fail(f"{value!r} is no size; allowed are bytes, or 500M, 20G, 1.5T (units of 1024).", param, ctx)
        return int(float(match[1]) * _SIZES[match[2].upper()])
