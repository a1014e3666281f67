"""Garbage collection in two steps: a plan that says what would go and why, and its execution.

Nothing is deleted that the plan did not name, and each item is looked at again under its lock first: what was
replaced, pinned or taken into use since the plan stays. Broken checkpoints are never taken by
a policy: somebody may still want to know what happened. What strangers put into the store is left alone.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from chrek.artifact import tree
from chrek.errors import ChrekError, Refused
from chrek.store import failures, layout, pins, trash
from chrek.store.delete import delete_locked, tidy
from chrek.store.listing import list_checkpoints
from chrek.store.locks import IdLock, Purpose, is_locked
from chrek.store.opening import open_checkpoint
from chrek.store.recovery import generations, recover

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from chrek.store.layout import Store
    from chrek.store.listing import Summary


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What may stay: ages in seconds, sizes in bytes; None sets no limit.

    *grace* is how long the trash keeps what readers may still have open.
    """

    max_age: float | None = None
    max_count: int | None = None
    max_bytes: int | None = None
    grace: float = trash.GRACE_SECONDS

    def __post_init__(self) -> None:
        if min(self.max_age or 0, self.max_count or 0, self.max_bytes or 0, self.grace) < 0:
            raise ValueError("a limit of a garbage collection is negative")


class What(Enum):
    """The kinds of work that a garbage collection does."""

    DELETE = "delete"
    PURGE = "purge"
    CLEAN = "clean"


@dataclass(frozen=True, kw_only=True)
class Action:
    """One thing to do; *name* is an id, or for a purge the directory in the trash. *size* is in bytes."""

    what: What
    name: str
    size: int
    why: str
    identity: str = ""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A checkpoint that a limit would have taken, or that no policy takes, and why it stays."""

    checkpoint_id: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a collection would do."""

    actions: tuple[Action, ...]
    kept: tuple[Kept, ...]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of an action: done, or *skipped* with the reason."""

    action: Action
    skipped: str | None = None


def plan(store: Store, policy: Policy, *, in_use: Collection[str] = (), now: float | None = None) -> Plan:
    """Decide what to collect; writes nothing. *in_use* are ids that must stay, *now* is in Unix seconds."""
    moment = time.time() if now is None else now
    actions: list[Action] = []
    kept: list[Kept] = []
    whole: dict[str, Summary] = {}
    for listed in list_checkpoints(store):
        if listed.summary is None:
            kept.append(Kept(checkpoint_id=listed.checkpoint_id, why=f"broken: {listed.problem}"))
        else:
            whole[listed.checkpoint_id] = listed.summary
    held = dict.fromkeys(pins.pinned_ids(store), "pinned") | dict.fromkeys(in_use, "in use")
    for name, why in _over_limits(whole, held, policy, moment).items():
        if name in held:
            kept.append(Kept(checkpoint_id=name, why=f"{held[name]}; {why}"))
        else:
            summary = whole[name]
            actions.append(
                Action(what=What.DELETE, name=name, size=summary.stored_bytes, why=why, identity=summary.identity)
            )
    actions += _debris(store)
    actions += _expired(store, policy.grace, moment)
    return Plan(actions=tuple(actions), kept=tuple(kept))


def collect(store: Store, todo: Plan, *, in_use: Collection[str] = ()) -> tuple[Outcome, ...]:
    """Carry out a plan; one item that cannot be done does not stop the others."""
    outcomes = [Outcome(action=action, skipped=_perform(store, action, in_use)) for action in todo.actions]
    _remove_unused_locks(store)
    failures.remove_old(store)
    return tuple(outcomes)


def _over_limits(whole: dict[str, Summary], held: dict[str, str], policy: Policy, now: float) -> dict[str, str]:
    """Return the ids past a limit with the reason; those that are *held* count, and do not go."""
    over: dict[str, str] = {}
    oldest_first = sorted(whole, key=lambda name: (whole[name].created, name))
    if policy.max_age is not None:
        for name in oldest_first:
            age = now - whole[name].created
            if age > policy.max_age:
                over[name] = f"{age:.0f} s old, more than {policy.max_age:.0f} s"

    def staying() -> list[str]:
        return [name for name in oldest_first if name not in over or name in held]

    for name in oldest_first:
        count, size = len(staying()), sum(whole[other].stored_bytes for other in staying())
        if name in over:
            continue
        if policy.max_count is not None and count > policy.max_count:
            over[name] = f"the oldest of {count}, more than {policy.max_count}"
        elif policy.max_bytes is not None and size > policy.max_bytes:
            over[name] = f"the oldest of {size} bytes in all, more than {policy.max_bytes}"
    return over


def _debris(store: Store) -> Iterable[Action]:
    """Yield the ids whose writer died and left something that recovery takes away."""
    staged = set(layout.private_ids(store, layout.STAGING))
    pending = set(layout.private_ids(store, layout.LINKS))
    numbered = {name: generations(store, name) for name in layout.private_ids(store, layout.GENERATIONS)}
    for name in sorted(staged | pending | numbered.keys()):
        try:
            place = layout.find(store, name)
        except Refused:
            place = None
        current = None if place is None else place.generation
        unlinked = [number for number in numbered.get(name, []) if number != current]
        found = ["an unfinished capture"] * (name in staged) + ["an unfinished publication"] * (name in pending)
        found += [f"generation {number}, which nothing points to" for number in unlinked]
        if found and not is_locked(store, name):
            paths = [f"{layout.STAGING}/{name}"] * (name in staged)
            paths += [layout.target(name, number) for number in unlinked]
            size = sum(_size(store, path) for path in paths)
            yield Action(what=What.CLEAN, name=name, size=size, why=", ".join(found))


def _expired(store: Store, grace: float, now: float) -> Iterable[Action]:
    for trashed in trash.list_trash(store):
        age = now - trashed.since
        if age >= grace:
            size = _size(store, f"{layout.TRASH}/{trashed.name}")
            why = f"{age:.0f} s in the trash, grace is {grace:.0f} s"
            yield Action(what=What.PURGE, name=trashed.name, size=size, why=why)


def _size(store: Store, path: str) -> int:
    """Return the bytes of all files below; what vanishes or cannot be read meanwhile counts nothing."""
    try:
        with layout.closing(tree.open_directory(store.fd, path)) as fd:
            return sum(entry.status.st_size for entry in tree.scan(fd) if not entry.is_directory)
    except (OSError, ValueError):
        return 0


def _perform(store: Store, action: Action, in_use: Collection[str]) -> str | None:
    """Do it; return why it was skipped, or None."""
    try:
        if action.what is What.PURGE:
            trash.purge(store, action.name)
            return None
        with IdLock.acquire(store, action.name, Purpose.CLEANUP) as lock:
            recover(store, lock)
            if action.what is What.DELETE:
                reason = _changed(store, action, in_use)
                if reason is not None:
                    return reason
                delete_locked(store, lock)
            tidy(store, lock)
    except (ChrekError, OSError) as error:
        return str(error)
    return None


def _changed(store: Store, action: Action, in_use: Collection[str]) -> str | None:
    if action.name in in_use:
        return "it came into use"
    if action.name in pins.pinned_ids(store):
        return "it was pinned"
    with open_checkpoint(store, action.name) as checkpoint:
        return None if checkpoint.marker.manifest_sha256 == action.identity else "it was replaced"


def _remove_unused_locks(store: Store) -> None:
    for name in layout.private_ids(store, layout.LOCKS):
        if layout.exists(store.fd, name) or layout.exists(store.fd, f"{layout.STAGING}/{name}"):
            continue
        # Whoever has it needs it, and an empty file that stays does no harm.
        with contextlib.suppress(ChrekError, OSError), IdLock.acquire(store, name, Purpose.CLEANUP) as lock:
            tidy(store, lock)
