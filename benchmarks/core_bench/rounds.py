"""The order of everything: each round runs every contender once, so that a busy moment is everybody's.

One process of a size is dumped by all contenders in all rounds, and then, after its end, restored by all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core_bench.beats import Beats
from core_bench.contenders import ChReK, Stock
from core_bench.place import INIT, SOURCE_PID, SOURCES, TARGET_PID, Place

MODES = ("lazy", "plain")
RESTORES = (("lazy", "full"), ("lazy", "off"))
"""Restores are measured from lazy checkpoints alone: a plain dump's is filled by the same code from other files."""
GUEST = Path(__file__).with_name("app.py")

Sample = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Size:
    """How much memory the process has, in bytes."""

    name: str
    random: int
    zero: int = 0


@dataclass
class Samples:
    """What was measured of one size: samples of each contender, by its name."""

    size: Size
    captures: dict[str, list[Sample]] = field(default_factory=dict)
    restores: dict[str, list[Sample]] = field(default_factory=dict)
    pipe_memory: int = 0


def measure(size: Size, *, stock: Stock, chrek: ChReK, scratch: Path, rounds: int, say: Say) -> Samples:
    """Measure one size."""
    samples = Samples(size)
    stock.size = chrek.size = size.random + size.zero
    with Beats(scratch / "beats") as beats:
        _captures(samples, stock, chrek, beats, rounds, say)
        _restores(samples, stock, chrek, beats, rounds, say)
    return samples


def _captures(samples: Samples, stock: Stock, chrek: ChReK, beats: Beats, rounds: int, say: Say) -> None:
    size = samples.size
    application = [INIT[0], str(GUEST), str(beats.path), str(size.random), str(size.zero)]
    with Place([*INIT, "--", *application], {}, SOURCE_PID) as place:
        beats.first_after(0, 300)
        contenders: dict[str, Callable[[], Sample]] = {"stock": lambda: stock.capture(place, beats)}
        for mode in MODES:
            contenders[mode] = lambda mode=mode: chrek.capture(place, beats, mode=mode)  # type: ignore[misc]
        for number in range(rounds):
            for name, capture in _turned(contenders, number):
                sample = capture()
                samples.captures.setdefault(name, []).append(sample)
                say(f"{size.name}, round {number + 1}: capture {name} {sample['seconds']:.3f} s")
        # Looking at thousands of pipes takes time: a run of its own, which nobody times.
        samples.pipe_memory = chrek.capture(place, beats, mode="lazy", count_pipes=True)["pipe_memory"]


def _restores(samples: Samples, stock: Stock, chrek: ChReK, beats: Beats, rounds: int, say: Say) -> None:
    def from_stock() -> Sample:
        with Place(["sleep", "infinity"], {}, TARGET_PID) as place:
            return stock.restore(place, beats)

    def from_chrek(mode: str, verify: str) -> Sample:
        with Place([*INIT, "--", "false"], {"DYN_CHECKPOINT_HASH": mode}, TARGET_PID) as place:
            _until_waiting(place.pid1)
            return chrek.restore(place, beats, mode=mode, verify=verify)

    contenders: dict[str, Callable[[], Sample]] = {"stock": from_stock}
    for mode, verify in RESTORES:
        contenders[f"{mode} {verify}"] = lambda mode=mode, verify=verify: from_chrek(mode, verify)  # type: ignore[misc]
    for number in range(rounds):
        for name, restore in _turned(contenders, number):
            sample = restore()
            samples.restores.setdefault(name, []).append(sample)
            say(f"{samples.size.name}, round {number + 1}: restore {name} {sample['seconds']:.3f} s")


def _turned(contenders: dict[str, Callable[[], Sample]], by: int) -> list[tuple[str, Callable[[], Sample]]]:
    """Return the contenders in an order that differs from round to round: nobody always comes after the same one."""
    items = list(contenders.items())
    by %= len(items)
    return items[by:] + items[:by]


def _until_waiting(pid1: int) -> None:
    import sys
    import time

    sys.path.insert(0, str(SOURCES))
    from chrek.errors import Refused
    from chrek.system.ids import HostPid
    from chrek.system.initstate import read_state

    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            if read_state(HostPid(pid1)).mode == "waiting":
                return
        except Refused:
            pass
        time.sleep(0.005)
    raise TimeoutError("the init does not wait for a restore")
