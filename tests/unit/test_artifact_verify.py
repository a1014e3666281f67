"""Damage of every kind is found, all of it, and nothing hangs or crashes."""

from __future__ import annotations

import os
import random
import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from chrek.artifact import Level
from chrek.artifact.manifest import read_manifest
from chrek.errors import ChrekError, Reason, Refused
from chrek.store import Staging, Store, open_checkpoint
from sample_store import BULK, CONTENTS, fill, make_manifest, publish, read_all

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_ALL = [*CONTENTS, "manifest.json", "checkpoint.done"]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Give a store with the checkpoint ``abc``."""
    with Store.open(tmp_path / "store", create=True) as store:
        publish(store, "abc")
        yield store


def _path(store: Store, name: str) -> str:
    return f"{store.path}/abc/{name}"


def _problems(store: Store, level: Level = Level.FULL) -> list[str]:
    """Return the files with problems; an unreadable manifest or marker is named by the refusal."""
    try:
        with open_checkpoint(store, "abc") as checkpoint:
            return [problem.path for problem in checkpoint.verify(level, workers=2).problems]
    except Refused as error:
        return [name for name in ("manifest.json", "checkpoint.done") if name in error.message]


def test_a_fresh_checkpoint_has_no_problems(store: Store) -> None:
    """Every level passes, and the contents are those that were written."""
    assert all(_problems(store, level) == [] for level in Level)
    assert read_all(store, "abc") == CONTENTS


@pytest.mark.parametrize("name", ["manifest.json", "checkpoint.done"])
def test_every_flipped_byte_of_the_metadata_is_found(store: Store, name: str) -> None:
    """Each byte in turn, to another value: the checkpoint is refused, never misread."""
    path = _path(store, name)
    with open(path, "r+b") as file:
        text = file.read()
        for index, byte in enumerate(text):
            for wrong in {byte ^ 1, byte ^ 0x20, byte ^ 0x80}:
                os.pwrite(file.fileno(), bytes([wrong]), index)
                with pytest.raises(Refused):
                    open_checkpoint(store, "abc").close()
            os.pwrite(file.fileno(), bytes([byte]), index)
    assert _problems(store) == []


@pytest.mark.parametrize("name", [name for name in CONTENTS if CONTENTS[name]])
def test_a_flipped_byte_of_any_file_is_found(store: Store, name: str) -> None:
    """First, last and random bytes of every file."""
    data = CONTENTS[name]
    for index in {0, len(data) - 1, *random.Random(name).sample(range(len(data)), min(8, len(data)))}:
        with open(_path(store, name), "r+b") as file:
            os.pwrite(file.fileno(), bytes([data[index] ^ 0x10]), index)
            assert _problems(store) == [name]
            with open_checkpoint(store, "abc") as checkpoint, pytest.raises(Refused, match="damaged"):
                checkpoint.read(name)
            os.pwrite(file.fileno(), data[index : index + 1], index)
    assert _problems(store) == []


def _truncate(path: str) -> None:
    os.truncate(path, os.path.getsize(path) // 2)


def _extend(path: str) -> None:
    os.truncate(path, os.path.getsize(path) + 1)


def _replace(make: Callable[[str], None]) -> Callable[[str], None]:
    def damage(path: str) -> None:
        os.rename(path, f"{os.path.dirname(path)}/.aside")
        make(path)
        os.unlink(f"{os.path.dirname(path)}/.aside")

    return damage


def _link_to_itself_elsewhere(path: str) -> None:
    """Replace the file by a link to an identical copy outside of the checkpoint."""
    copy = shutil.copy(path, f"{path.partition('/abc/')[0]}/.copy")
    os.unlink(path)
    os.symlink(copy, path)


_DAMAGES = {
    "truncated": _truncate,
    "emptied": lambda path: os.truncate(path, 0),
    "extended": _extend,
    "removed": os.unlink,
    "link to a copy": _link_to_itself_elsewhere,
    "link to a device": _replace(lambda path: os.symlink("/dev/zero", path)),
    "dangling link": _replace(lambda path: os.symlink("nowhere", path)),
    "FIFO": _replace(os.mkfifo),
    "directory": _replace(os.mkdir),
    "hard link": lambda path: os.link(path, f"{path.partition('/abc/')[0]}/.hard"),
    "unreadable directory entry": _replace(lambda path: os.symlink(path, path)),
}


@pytest.mark.parametrize(
    ("name", "damage"),
    # An empty file cannot get shorter.
    [(n, d) for n in _ALL for d in _DAMAGES if CONTENTS.get(n, b"x") or d not in {"truncated", "emptied"}],
)
def test_every_file_damaged_in_every_way_is_found(store: Store, name: str, damage: str) -> None:
    """Even without reading bulk data: sizes, types and links are always looked at."""
    _DAMAGES[damage](_path(store, name))
    for level in Level:
        found = _problems(store, level)
        assert name in found
        # A directory in place of a file is one problem, its emptiness none.
        assert set(found) == {name}


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda path: Path(path, "images/added").touch(), "images/added"),
        (lambda path: os.mkdir(f"{path}/empty"), "empty"),
        (lambda path: os.symlink("/etc", f"{path}/volumes/etc"), "volumes/etc"),
        (lambda path: os.mkfifo(f"{path}/pipe"), "pipe"),
        (lambda path: Path(path, "caf\udce9").touch(), "caf\udce9"),
    ],
)
def test_what_was_added_is_found(store: Store, make: Callable[[str], None], found: str) -> None:
    """Files, directories, links and FIFOs that the manifest does not name, whatever their names."""
    make(f"{store.path}/abc")
    assert _problems(store, Level.OFF) == [found]


def test_a_directory_replaced_by_a_link_is_not_followed(store: Store) -> None:
    """The same files behind a symbolic link are not the checkpoint's files."""
    os.rename(_path(store, "images"), f"{store.path}/elsewhere")
    os.symlink(f"{store.path}/elsewhere", _path(store, "images"))
    assert "images" in _problems(store)
    with open_checkpoint(store, "abc") as checkpoint, pytest.raises(Refused) as caught:
        checkpoint.read("images/core-7.img")
    assert caught.value.reason is Reason.CORRUPT


def test_all_problems_are_reported_at_once(store: Store) -> None:
    """The report has every damaged file; the error names the first and counts the rest."""
    for name in CONTENTS:
        _extend(_path(store, name))
    with open_checkpoint(store, "abc") as checkpoint:
        report = checkpoint.verify()
    assert [problem.path for problem in report.problems] == sorted(CONTENTS)
    with pytest.raises(Refused, match=r"dump.log: has 20 bytes instead of 19.*and 1 more"):
        report.require_ok("abc")


def test_levels_read_what_they_say(store: Store) -> None:
    """Full reads everything; sampled the ends of bulk files; off no bulk data, but all small files."""
    small = sum(len(data) for name, data in CONTENTS.items() if name != BULK)
    with open_checkpoint(store, "abc") as checkpoint:
        read = {level: checkpoint.verify(level).bytes_read for level in Level}
    assert read[Level.FULL] == small + len(CONTENTS[BULK])
    assert read[Level.OFF] == small
    assert small < read[Level.SAMPLED] < read[Level.FULL]


def test_damage_in_the_middle_of_bulk_data_passes_only_levels_that_do_not_read_it(store: Store) -> None:
    """What each level promises: off does not look, full does."""
    with open(_path(store, BULK), "r+b") as file:
        os.pwrite(file.fileno(), b"\xff", 70_000)
    assert _problems(store, Level.OFF) == []
    assert _problems(store, Level.FULL) == [BULK]


def test_progress_reaches_the_total(store: Store) -> None:
    """Progress only grows, and ends at the number of bytes to read."""
    seen: list[tuple[int, int]] = []
    with open_checkpoint(store, "abc") as checkpoint:
        report = checkpoint.verify(workers=4, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (report.bytes_read, report.bytes_read)


def test_a_file_that_is_cut_while_it_is_verified_is_a_problem_and_no_crash(store: Store) -> None:
    """Truncation in mid-reading must not kill the reader (it would, with a mapping)."""
    with Staging.create(store, "big") as staging:
        files = fill(staging, {"memory/shard": bytes(64 << 20)})
        staging.publish(make_manifest("big", files))
    cut = threading.Event()

    def on_progress(done: int, total: int) -> None:
        if done < total and not cut.is_set():
            os.truncate(f"{store.path}/big/memory/shard", 4096)
            cut.set()

    with open_checkpoint(store, "big") as checkpoint:
        report = checkpoint.verify(workers=2, progress=on_progress)
    assert [problem.path for problem in report.problems] == ["memory/shard"]


def test_deep_or_endless_trees_are_a_problem_not_a_crash(store: Store) -> None:
    """A directory nested a hundred deep ends the walk with a report."""
    fd = os.open(f"{store.path}/abc/images", os.O_RDONLY)
    for _ in range(100):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    with open_checkpoint(store, "abc") as checkpoint:
        report = checkpoint.verify()
    assert any("nested" in problem.text for problem in report.problems)


def test_a_manifest_swapped_for_another_valid_one_is_found(store: Store) -> None:
    """The marker names one manifest; another one, though well-formed, is not it."""
    publish(store, "other")
    shutil.copy(f"{store.path}/other/manifest.json", _path(store, "manifest.json"))
    assert read_manifest(Path(_path(store, "manifest.json")).read_bytes()).checkpoint_id == "other"
    with pytest.raises(ChrekError, match=r"manifest\.json .*digest differs"):
        open_checkpoint(store, "abc")


def test_a_file_the_manifest_does_not_name_cannot_be_opened(store: Store) -> None:
    """Whatever path is asked for, only the manifest's files are opened."""
    with open_checkpoint(store, "abc") as checkpoint:
        for path in ("manifest.json", "../abc/dump.log", "/etc/passwd", "images", ""):
            with pytest.raises(Refused, match="has no file"):
                checkpoint.open(path)
        os.close(checkpoint.open("dump.log"))
        with pytest.raises(Refused, match="more than 10"):
            checkpoint.read("dump.log", limit=10)
