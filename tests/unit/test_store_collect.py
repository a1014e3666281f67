"""Listing, deleting, pinning and garbage collection."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from chrek.errors import Reason, Refused, UsageError
from chrek.store import (
    Action,
    Plan,
    Policy,
    Staging,
    Store,
    What,
    collect,
    delete,
    list_checkpoints,
    open_checkpoint,
    pin,
    pinned_ids,
    plan,
    unpin,
)
from sample_store import CONTENTS, fill, publish, read_all, tree_of

if TYPE_CHECKING:
    from collections.abc import Iterator

_SIZE = sum(map(len, CONTENTS.values()))
_NOW = 1_800_000_000.0


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Give a store with strangers' things in it, which must survive everything."""
    with Store.open(tmp_path / "store", create=True) as store:
        root = Path(store.path)
        (root / "README").write_text("not a checkpoint")
        (root / "lost+found").mkdir()
        (root / "models").mkdir()
        (root / "models" / "weights.bin").write_text("precious")
        for private in (".generations", ".staging", ".trash", ".locks", ".pins", ".links"):
            (root / private).mkdir(mode=0o700)
            (root / private / ".keep").touch()
        (root / ".trash" / "holiday photos").mkdir()
        (root / ".trash" / "17.photos").touch()
        strangers = tree_of(root)
        yield store
        assert {name: kind for name, kind in tree_of(root).items() if name in strangers} == strangers


def _actions(todo: Plan, what: What) -> list[str]:
    return [action.name for action in todo.actions if action.what is what]


def _ids(store: Store) -> list[str]:
    return [listed.checkpoint_id for listed in list_checkpoints(store)]


def test_a_list_has_whole_and_broken_checkpoints_and_nothing_else(store: Store) -> None:
    """Each broken one says what is wrong with it."""
    for name in ("whole", "no-manifest", "no-marker", "bad-marker", "too-new", "dangling"):
        publish(store, name, created=_NOW)
    root = Path(store.path)
    (root / "no-manifest" / "manifest.json").unlink()
    (root / "no-marker" / "checkpoint.done").unlink()
    (root / "bad-marker" / "checkpoint.done").write_text("{}")
    (root / "foreign").symlink_to("/etc")
    shutil.rmtree(root / ".generations" / "dangling")
    pin(store, "whole")
    found = {listed.checkpoint_id: listed for listed in list_checkpoints(store)}
    assert sorted(found) == ["bad-marker", "dangling", "foreign", "no-manifest", "no-marker", "too-new", "whole"]
    reasons = {name: listed.problem.reason for name, listed in found.items() if listed.problem}
    assert reasons == {
        "no-manifest": Reason.CORRUPT,
        "no-marker": Reason.NOT_FOUND,
        "bad-marker": Reason.CORRUPT,
        "foreign": Reason.CORRUPT,
        "dangling": Reason.NOT_FOUND,
    }
    summary = found["whole"].summary
    assert summary is not None
    assert (summary.created, summary.stored_bytes, summary.files, summary.host) == (
        _NOW,
        _SIZE,
        len(CONTENTS),
        "node-1",
    )
    assert found["whole"].pinned
    assert not found["dangling"].pinned


def test_a_deleted_checkpoint_stays_readable_for_who_has_it_open(store: Store) -> None:
    """It is gone for others at once, and its generation waits in the trash."""
    publish(store, "abc")
    with open_checkpoint(store, "abc") as checkpoint:
        delete(store, "abc")
        assert _ids(store) == []
        with pytest.raises(Refused) as caught:
            open_checkpoint(store, "abc")
        assert caught.value.reason is Reason.NOT_FOUND
        checkpoint.verify().require_ok("abc")
    assert not os.path.exists(f"{store.path}/.locks/abc")
    assert not os.path.exists(f"{store.path}/.generations/abc")


@pytest.mark.parametrize("name", ["README", "models", "lost+found", "none", "foreign"])
def test_only_checkpoints_can_be_deleted(store: Store, name: str) -> None:
    """A stranger's file, directory or link is refused, and so is what is not there."""
    Path(store.path, "foreign").symlink_to("models")
    with pytest.raises((Refused, UsageError)):
        delete(store, name)
    assert os.readlink(f"{store.path}/foreign") == "models"


def test_broken_and_plain_checkpoints_can_be_deleted(store: Store) -> None:
    """Whatever ChReK or a copy of it left half, with a manifest or a marker, can go."""
    publish(store, "broken")
    Path(store.path, "broken", "checkpoint.done").write_text("{}")
    publish(store, "plain")
    shutil.copytree(f"{store.path}/plain", f"{store.path}/aside")
    delete(store, "plain")
    os.rename(f"{store.path}/aside", f"{store.path}/plain")
    publish(store, "dangling")
    shutil.rmtree(f"{store.path}/.generations/dangling")
    for name in ("broken", "plain", "dangling"):
        delete(store, name)
    assert _ids(store) == []


def test_an_id_that_is_being_captured_cannot_be_deleted(store: Store) -> None:
    """The refusal is the one of a second capture."""
    publish(store, "abc")
    with Staging.create(store, "abc"), pytest.raises(Refused) as caught:
        delete(store, "abc")
    assert caught.value.reason is Reason.CAPTURE_IN_PROGRESS
    read_all(store, "abc")


def test_age_takes_what_is_older(store: Store) -> None:
    """The reason has both numbers; a time in the future is no age."""
    for name, age in (("old", 200), ("young", 50), ("future", -1000)):
        publish(store, name, created=_NOW - age)
    todo = plan(store, Policy(max_age=100), now=_NOW)
    assert [(action.name, action.why, action.size) for action in todo.actions] == [
        ("old", "200 s old, more than 100 s", _SIZE)
    ]


def test_count_takes_the_oldest(store: Store) -> None:
    """As many stay as the limit says."""
    for number in range(5):
        publish(store, f"c{number}", created=_NOW - number)
    assert _actions(plan(store, Policy(max_count=2), now=_NOW), What.DELETE) == ["c4", "c3", "c2"]
    assert _actions(plan(store, Policy(max_count=5), now=_NOW), What.DELETE) == []
    assert len(_actions(plan(store, Policy(max_count=0), now=_NOW), What.DELETE)) == 5


def test_total_size_takes_the_oldest_until_the_rest_fits(store: Store) -> None:
    """Exactly the limit still fits."""
    for number in range(4):
        publish(store, f"c{number}", created=_NOW - number)
    assert _actions(plan(store, Policy(max_bytes=2 * _SIZE), now=_NOW), What.DELETE) == ["c3", "c2"]
    assert _actions(plan(store, Policy(max_bytes=2 * _SIZE - 1), now=_NOW), What.DELETE) == ["c3", "c2", "c1"]


def test_pinned_and_used_checkpoints_stay_and_are_said_to(store: Store) -> None:
    """They count towards the limits, and others go in their place."""
    for number in range(4):
        publish(store, f"c{number}", created=_NOW - number)
    pin(store, "c3")
    todo = plan(store, Policy(max_count=2), in_use=["c2"], now=_NOW)
    assert _actions(todo, What.DELETE) == ["c1", "c0"]
    assert {kept.checkpoint_id: kept.why.partition(";")[0] for kept in todo.kept} == {"c3": "pinned", "c2": "in use"}
    unpin(store, "c3")
    unpin(store, "c3")
    assert pinned_ids(store) == frozenset()


def test_planning_changes_nothing_and_collecting_does_what_was_planned(store: Store) -> None:
    """A dry run is the plan."""
    for number in range(3):
        publish(store, f"c{number}", created=_NOW - number)
    before = tree_of(Path(store.path))
    todo = plan(store, Policy(max_count=1), now=_NOW)
    assert tree_of(Path(store.path)) == before
    assert [outcome.skipped for outcome in collect(store, todo)] == [None, None]
    assert _ids(store) == ["c0"]


def test_broken_checkpoints_stay_and_are_named(store: Store) -> None:
    """No policy takes what somebody may still want to look at."""
    publish(store, "broken", created=0)
    Path(store.path, "broken", "checkpoint.done").write_text("{}")
    todo = plan(store, Policy(max_age=1, max_count=0, max_bytes=0), now=_NOW)
    assert todo.actions == ()
    assert [kept.checkpoint_id for kept in todo.kept] == ["broken"]
    assert todo.kept[0].why.startswith("broken: CORRUPT")


@pytest.mark.parametrize("event", ["replaced", "pinned", "used", "deleted", "captured"])
def test_what_changed_since_the_plan_stays(store: Store, event: str) -> None:
    """Each item is looked at again under its lock."""
    publish(store, "abc", created=0)
    todo = plan(store, Policy(max_age=1))
    assert _actions(todo, What.DELETE) == ["abc"]
    staging = None
    match event:
        case "replaced":
            publish(store, "abc", created=time.time())
        case "pinned":
            pin(store, "abc")
        case "deleted":
            delete(store, "abc")
        case "captured":
            staging = Staging.create(store, "abc")
    (outcome,) = collect(store, todo, in_use=["abc"] if event == "used" else [])
    assert outcome.skipped is not None
    assert (_ids(store) == ["abc"]) == (event != "deleted")
    if staging:
        staging.discard()


def test_the_trash_is_purged_after_the_grace_period(store: Store) -> None:
    """Not before, and only what ChReK put there."""
    publish(store, "abc")
    delete(store, "abc")
    assert _actions(plan(store, Policy()), What.PURGE) == []
    todo = plan(store, Policy(grace=100), now=time.time() + 101)
    assert [(action.what, action.size > _SIZE) for action in todo.actions] == [(What.PURGE, True)]
    assert [outcome.skipped for outcome in collect(store, todo)] == [None]
    assert sorted(os.listdir(f"{store.path}/.trash")) == [".keep", "17.photos", "holiday photos"]
    assert [outcome.skipped for outcome in collect(store, todo)] == [None]  # somebody else was faster


def test_debris_of_dead_writers_is_taken_and_that_of_live_ones_is_not(store: Store) -> None:
    """A staging directory belongs to the holder of the lock, as long as it lives."""
    root = Path(store.path)
    publish(store, "abc")
    (root / ".staging" / "dead").mkdir()
    (root / ".staging" / "dead" / "shard").write_bytes(b"x" * 1000)
    shutil.copytree(root / "abc", root / ".generations" / "abc" / "7")
    (root / ".links" / "abc").symlink_to(".generations/abc/7")
    with Staging.create(store, "alive") as staging:
        fill(staging, CONTENTS)
        todo = plan(store, Policy())
        assert sorted(_actions(todo, What.CLEAN)) == ["abc", "dead"]
        assert [outcome.skipped for outcome in collect(store, todo)] == [None, None]
        assert os.path.exists(f"{staging.path}/dump.log")
    assert not (root / ".staging" / "dead").exists()
    assert os.listdir(root / ".generations" / "abc") == ["1"]
    assert not os.path.lexists(root / ".links" / "abc")
    assert read_all(store, "abc") == CONTENTS
    assert plan(store, Policy()).actions == ()
    assert not (root / ".locks" / "dead").exists()


def test_a_directory_nobody_can_remove_is_reported_and_does_not_stop_the_rest(store: Store) -> None:
    """Each action has its own outcome."""
    publish(store, "abc", created=0)
    todo = plan(store, Policy(max_age=1))
    ghost = Action(what=What.DELETE, name="ghost", size=0, why="test", identity="x")
    outcomes = collect(store, Plan(actions=(ghost, *todo.actions), kept=()))
    assert [outcome.skipped is None for outcome in outcomes] == [False, True]


@pytest.mark.parametrize("limits", [{"max_age": -1}, {"max_count": -1}, {"max_bytes": -1}, {"grace": -0.1}])
def test_negative_limits_are_a_mistake(limits: dict[str, int]) -> None:
    """They would take everything."""
    with pytest.raises(ValueError, match="negative"):
        Policy(**limits)
