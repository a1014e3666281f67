"""Staging and publication: old or new, never a mixture, never someone else's directory."""

from __future__ import annotations

import gc
import os
import shutil
import stat
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from chrek.artifact import Algorithm, Blocks, FileEntry
from chrek.errors import CaptureFailed, ChrekError, Reason, Refused, UsageError
from chrek.store import Staging, Store, open_checkpoint, write_file
from sample_store import CONTENTS, fill, make_manifest, publish, read_all, tree_of

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Give an empty store."""
    with Store.open(tmp_path / "store", create=True) as store:
        yield store


def _names(store: Store) -> dict[str, str]:
    return {name: kind for name, kind in tree_of(Path(store.path)).items() if name.count("/") < 3}


def test_a_published_checkpoint_is_a_link_to_its_generation(store: Store) -> None:
    """The layout is the documented one."""
    published = publish(store, "abc")
    assert published.generation == 1
    assert published.warnings == ()
    assert os.readlink(f"{store.path}/abc") == ".generations/abc/1"
    assert read_all(store, "abc") == CONTENTS


def test_replacing_moves_the_old_generation_to_the_trash(store: Store) -> None:
    """The link points to the next generation; the old one is whole in the trash."""
    publish(store, "abc", {"dump.log": b"old"})
    publish(store, "abc", {"dump.log": b"new"})
    assert os.readlink(f"{store.path}/abc") == ".generations/abc/2"
    assert read_all(store, "abc") == {"dump.log": b"new"}
    (trashed,) = os.listdir(f"{store.path}/.trash")
    assert Path(store.path, ".trash", trashed, "dump.log").read_bytes() == b"old"
    assert os.listdir(f"{store.path}/.generations/abc") == ["2"]


def test_files_are_0600_and_directories_0700_whatever_wrote_them(store: Store) -> None:
    """A checkpoint holds everything the process knew."""
    with Staging.create(store, "abc") as staging:
        files = fill(staging, CONTENTS)
        os.chmod(f"{staging.path}/dump.log", 0o644)
        os.chmod(f"{staging.path}/images", 0o755)
        staging.publish(make_manifest("abc", files))
    for path in Path(store.path).rglob("*"):
        if not path.is_symlink():
            assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


def test_leaving_without_publishing_removes_everything(store: Store) -> None:
    """An error in the middle leaves no files, and the id free."""
    staging = Staging.create(store, "abc")
    fill(staging, CONTENTS)
    with pytest.raises(RuntimeError, match="half way"), staging:
        raise RuntimeError("half way")
    private = dict.fromkeys((".generations", ".links", ".locks", ".staging", ".trash"), "dir")
    assert _names(store) == private | {".locks/abc": "file"}
    publish(store, "abc")


def test_directories_without_files_are_not_published(store: Store) -> None:
    """Only what the manifest can name is in a checkpoint."""
    with Staging.create(store, "abc") as staging:
        for path in ("gpu", "a/b/c/d", "volumes"):
            os.close(staging.make_directory(path))
        files = fill(staging, {"volumes/0.tar": b"x"})
        staging.publish(make_manifest("abc", files))
    assert sorted(os.listdir(f"{store.path}/abc")) == ["checkpoint.done", "manifest.json", "volumes"]
    assert read_all(store, "abc") == {"volumes/0.tar": b"x"}


@pytest.mark.parametrize("bad", ["", "..", "a/b", ".staging", "x" * 64])
def test_a_bad_id_touches_nothing(store: Store, bad: str) -> None:
    """The id is looked at before the store is."""
    for call in (lambda: Staging.create(store, bad), lambda: open_checkpoint(store, bad)):
        with pytest.raises(UsageError) as caught:
            call()
        assert caught.value.reason is Reason.BAD_ID
    assert _names(store) == {}


@pytest.mark.parametrize("how", ["missing file", "extra file", "other size", "link", "hard link", "FIFO"])
def test_a_directory_that_differs_from_its_manifest_is_not_published(store: Store, how: str) -> None:
    """The old checkpoint stays."""
    publish(store, "abc", {"dump.log": b"old"})
    with Staging.create(store, "abc") as staging, pytest.raises(CaptureFailed) as caught:  # noqa: PT012 - one of many
        files = fill(staging, CONTENTS)
        path = Path(staging.path)
        match how:
            case "missing file":
                (path / "dump.log").unlink()
            case "extra file":
                (path / "extra").touch()
            case "other size":
                (path / "dump.log").write_bytes(b"longer than it was before")
            case "link":
                (path / "dump.log").unlink()
                (path / "dump.log").symlink_to("/etc/passwd")
            case "hard link":
                os.link(path / "dump.log", Path(store.path) / ".hard")
            case "FIFO":
                (path / "dump.log").unlink()
                os.mkfifo(path / "dump.log")
        staging.publish(make_manifest("abc", files))
    assert caught.value.reason is Reason.WRITE_FAILED
    assert read_all(store, "abc") == {"dump.log": b"old"}
    assert os.listdir(f"{store.path}/.staging") == []


def test_blobs_of_pools_may_have_several_names(store: Store) -> None:
    """Pools' blobs are linked from where the application left them, and shared by checkpoints of the same weights."""
    blob = f"gpu/weights.7/blobs/{'ab' * 32}"
    with Staging.create(store, "abc") as staging:
        files = fill(staging, {**CONTENTS, blob: b"weights"})
        os.link(Path(staging.path) / blob, Path(store.path) / ".shared")
        staging.publish(make_manifest("abc", files))
    assert read_all(store, "abc")[blob] == b"weights"


def test_writers_digests_are_taken_and_the_rest_is_computed(store: Store) -> None:
    """Bulk data is not read again when its writer digested it; a wrong digest of his is found by verify."""
    with Staging.create(store, "abc") as staging:
        write_file(staging.fd, "shard", bytes(65536))
        write_file(staging.fd, "dump.log", b"log")
        wrong = FileEntry.of_blocks(Blocks(size=65536, block_size=65536, digests=bytes(32), algorithm=Algorithm.SHA256))
        files = staging.digest(known={"shard": wrong})
        assert files == {"shard": wrong, "dump.log": FileEntry.of_bytes(b"log")}
        staging.publish(make_manifest("abc", files))
    with open_checkpoint(store, "abc") as checkpoint:
        assert [problem.path for problem in checkpoint.verify().problems] == ["shard"]


def test_a_large_file_is_digested_by_all_threads_and_right(store: Store) -> None:
    """Small, bulk and large files in one checkpoint: verification, which cuts them differently, agrees."""
    with Staging.create(store, "abc") as staging:
        for name, size in (("empty", 0), ("small", 100), ("bulk", 9 << 20), ("large", (64 << 20) + 1)):
            write_file(staging.fd, name, os.urandom(size))
        files = staging.digest(workers=3)
        staging.publish(make_manifest("abc", files))
    assert [files[name].bulk is None for name in ("empty", "small", "bulk", "large")] == [True, True, False, False]
    with open_checkpoint(store, "abc") as checkpoint:
        checkpoint.verify(workers=2).require_ok("abc")


def test_a_manifest_that_readers_would_refuse_is_not_published(store: Store) -> None:
    """One of another id, and one with more files than a reader takes; the old checkpoint stays."""
    publish(store, "abc", {"dump.log": b"old"})
    for checkpoint_id, entries in (("other", 1), ("abc", 250_000)):
        with Staging.create(store, "abc") as staging:
            files = {f"images/{number}": FileEntry.of_bytes(b"") for number in range(entries)}
            with pytest.raises(CaptureFailed) as caught:
                staging.publish(make_manifest(checkpoint_id, files))
        assert caught.value.reason is Reason.WRITE_FAILED
    assert read_all(store, "abc") == {"dump.log": b"old"}


def test_what_took_the_name_during_the_capture_stays(store: Store) -> None:
    """A directory that somebody made meanwhile is not replaced, and the capture says why it failed."""
    with Staging.create(store, "abc") as staging:
        files = fill(staging, CONTENTS)
        Path(store.path, "abc").mkdir()
        Path(store.path, "abc", "precious").touch()
        with pytest.raises(CaptureFailed) as caught:
            staging.publish(make_manifest("abc", files))
    assert caught.value.reason is Reason.ID_IN_USE_DIFFERENT
    assert os.listdir(f"{store.path}/abc") == ["precious"]
    assert os.listdir(f"{store.path}/.staging") == []
    assert os.listdir(f"{store.path}/.generations/abc") == []


def test_a_plain_directory_is_a_checkpoint_and_can_be_replaced(store: Store) -> None:
    """A checkpoint that a person copied in works, and goes to the trash when it is replaced."""
    publish(store, "abc", {"dump.log": b"old"})
    shutil.copytree(f"{store.path}/abc", f"{store.path}/aside")
    shutil.rmtree(f"{store.path}/.generations/abc")
    os.unlink(f"{store.path}/abc")
    os.rename(f"{store.path}/aside", f"{store.path}/abc")
    assert read_all(store, "abc") == {"dump.log": b"old"}
    publish(store, "abc", {"dump.log": b"new"})
    assert os.path.islink(f"{store.path}/abc")
    assert read_all(store, "abc") == {"dump.log": b"new"}
    assert len(os.listdir(f"{store.path}/.trash")) == 1


def test_a_checkpoint_copied_under_another_name_is_refused(store: Store) -> None:
    """The id is part of what the marker seals; the cure says what the name should be."""
    publish(store, "abc")
    shutil.copytree(f"{store.path}/abc", f"{store.path}/other")
    with pytest.raises(Refused) as caught:
        open_checkpoint(store, "other")
    assert "'abc'" in caught.value.cure


def test_an_empty_directory_made_for_a_mount_is_replaced(store: Store) -> None:
    """DYN_CHECKPOINT_LOCATION may have been made beforehand."""
    os.mkdir(f"{store.path}/abc")
    publish(store, "abc")
    assert read_all(store, "abc") == CONTENTS


@pytest.mark.parametrize("kind", ["directory", "file", "link", "link out", "link to another id", "FIFO"])
def test_what_is_not_a_checkpoint_is_never_replaced(store: Store, kind: str) -> None:
    """Somebody's directory, file or link of that name is refused before anything is written, and stays."""
    path = Path(store.path) / "abc"
    publish(store, "other")
    match kind:
        case "directory":
            path.mkdir()
            (path / "precious").touch()
        case "file":
            path.touch()
        case "link":
            path.symlink_to("other")
        case "link out":
            path.symlink_to("/etc")
        case "link to another id":
            path.symlink_to(".generations/other/1")
        case "FIFO":
            os.mkfifo(path)
    before = _names(store)
    with pytest.raises(Refused) as caught:
        Staging.create(store, "abc")
    assert caught.value.reason is Reason.ID_IN_USE_DIFFERENT
    assert {name: kind for name, kind in _names(store).items() if name != ".locks/abc"} == before
    with pytest.raises(Refused):
        open_checkpoint(store, "abc")


@pytest.mark.parametrize("link", ["..", "/etc", ".generations/../x", ".generations/abc/0", ".generations/abc/01",
                                  ".generations/abc/1/", ".generations/abc/1/images", "./.generations/abc/1",
                                  ".staging/abc", ".generations/abc", "x" * 4000])  # fmt: skip
def test_only_links_of_the_managed_form_are_followed(store: Store, link: str) -> None:
    """A link with any other target is refused, even if a checkpoint is behind it."""
    publish(store, "abc")
    os.unlink(f"{store.path}/abc")
    os.symlink(link, f"{store.path}/abc")
    with pytest.raises(Refused) as caught:
        open_checkpoint(store, "abc")
    assert caught.value.reason is Reason.CORRUPT


@pytest.mark.parametrize("part", [".generations", ".generations/abc", ".generations/abc/1"])
def test_a_link_in_the_way_to_the_generation_is_not_followed(store: Store, part: str) -> None:
    """No component of the path may have become a link."""
    publish(store, "abc")
    os.rename(f"{store.path}/{part}", f"{store.path}/moved")
    os.symlink(f"{store.path}/moved", f"{store.path}/{part}")
    with pytest.raises(Refused) as caught:
        open_checkpoint(store, "abc")
    assert caught.value.reason is Reason.CORRUPT


@pytest.mark.parametrize("private", [".staging", ".generations", ".links", ".locks", ".trash"])
def test_a_private_directory_that_became_a_link_is_never_written_through(store: Store, private: str) -> None:
    """Whoever can write to the store cannot lead a capture out of it."""
    publish(store, "abc", {"dump.log": b"old"})
    publish(store, "abc", {"dump.log": b"old"})
    outside = Path(store.path).parent / "outside"
    outside.mkdir()
    os.rename(f"{store.path}/{private}", f"{store.path}/moved")
    os.symlink(outside, f"{store.path}/{private}")
    try:
        published = publish(store, "abc", {"dump.log": b"new"})
    except ChrekError:
        pass
    else:
        assert private == ".trash"  # noted too late to fail: the new checkpoint is in place
        assert published.warnings
    assert list(outside.iterdir()) == []


def test_two_captures_of_one_id_at_once_are_refused(store: Store) -> None:
    """The second is told so; the first goes on; other ids are free; afterwards the id is."""
    with Staging.create(store, "abc") as staging:
        files = fill(staging, CONTENTS)
        with pytest.raises(Refused) as caught:
            Staging.create(store, "abc")
        assert caught.value.reason is Reason.CAPTURE_IN_PROGRESS
        assert f"process {os.getpid()} on {os.uname().nodename}" in caught.value.message
        publish(store, "other")
        staging.publish(make_manifest("abc", files))
    publish(store, "abc")


def test_a_capture_waits_for_a_cleanup_that_is_at_work(store: Store) -> None:
    """Garbage collection of an id's debris does not make a capture fail."""
    from chrek.store.locks import IdLock, Purpose

    lock = IdLock.acquire(store, "abc", Purpose.CLEANUP)
    done = threading.Event()

    def capture() -> None:
        publish(store, "abc")
        done.set()

    thread = threading.Thread(target=capture)
    thread.start()
    assert not done.wait(0.5)
    lock.release()
    assert done.wait(60)
    thread.join()


def test_readers_see_old_or_new_while_it_is_replaced_again_and_again(store: Store) -> None:
    """Every open of every reader gives one whole checkpoint, and what was opened stays readable."""
    publish(store, "abc", {"a": b"0", "b": b"0"})
    stop = threading.Event()
    seen: list[set[bytes]] = []
    failures: list[BaseException] = []

    def read() -> None:
        try:
            while not stop.is_set():
                seen.append(set(read_all(store, "abc").values()))
        except BaseException as error:  # noqa: BLE001 - the test's own thread reports it
            failures.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    number = 0
    # As often as it takes for the readers to have had their turns.
    while number < 30 or (len(set(map(frozenset, seen))) < 2 and not failures):
        number += 1
        publish(store, "abc", {"a": b"%d" % number, "b": b"%d" % number})
    stop.set()
    for reader in readers:
        reader.join()
    assert failures == []
    assert all(len(values) == 1 for values in seen)
    assert len({next(iter(values)) for values in seen}) > 1


def test_a_marker_says_where_and_carries_extra_keys(store: Store) -> None:
    """The location is the one that the caller gives, the digest that of the manifest."""
    with Staging.create(store, "abc") as staging:
        files = fill(staging, CONTENTS)
        published = staging.publish(make_manifest("abc", files), location="/checkpoints/abc", extra={"pod_uid": "u"})
    assert published.marker.checkpoint_path == "/checkpoints/abc"
    with open_checkpoint(store, "abc") as checkpoint:
        assert checkpoint.marker == published.marker
        assert checkpoint.marker.extra == {"pod_uid": "u"}


def test_a_store_that_is_not_there_is_named(tmp_path: Path) -> None:
    """The message names the path, the cure the option."""
    with pytest.raises(Refused) as caught:
        Store.open(tmp_path / "none")
    assert caught.value.reason is Reason.NOT_FOUND
    assert str(tmp_path / "none") in caught.value.message


def test_no_descriptor_stays_open(store: Store) -> None:
    """Publishing, reading, failing and refusing leave no descriptor behind."""
    publish(store, "abc")
    gc.collect()  # what earlier tests left
    before = set(os.listdir("/proc/self/fd"))
    publish(store, "abc")
    read_all(store, "abc")
    with Staging.create(store, "abc"), pytest.raises(Refused):
        Staging.create(store, "abc")
    with pytest.raises(Refused):
        open_checkpoint(store, "none")
    assert set(os.listdir("/proc/self/fd")) <= before
