"""Taking pools' files into a checkpoint: what is taken, what is not, and that the source keeps its own."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from chrek.cuda import handover
from chrek.cuda.handover import Adopted, adopt, discard
from chrek.errors import CaptureFailed, Reason
from chrek.system.ids import NsPid
from chrek.workload.pool import layout, places

ONE, TWO = "1" * 64, "2" * 64


class Store:
    """A store with a handover directory and a staging directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.staging = path / ".staging"
        self.staging.mkdir()
        self.fd = os.open(path, os.O_RDONLY)
        self.staging_fd = os.open(self.staging, os.O_RDONLY)

    def pool(self, name: str, blobs: dict[str, bytes], *, named: list[object] | None = None) -> Path:
        """A pool's directory as a process leaves it."""
        directory = self.path / ".handover" / "model" / "gpu" / name
        (directory / "blobs").mkdir(parents=True)
        for blob, data in blobs.items():
            (directory / "blobs" / blob).write_bytes(data)
        index = {"blobs": [{"name": blob} for blob in (list(blobs) if named is None else named)]}
        (directory / "index.json").write_text(json.dumps(index))
        return directory

    def adopt(self, *pids: int) -> Adopted:
        """Take the pools of these processes."""
        return adopt(self.fd, "model", self.staging_fd, [NsPid(pid) for pid in pids])


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """An empty store."""
    made = Store(tmp_path)
    yield made
    os.close(made.fd)
    os.close(made.staging_fd)


def test_names_are_those_of_the_pool() -> None:
    """Both sides of the handover use the same names."""
    assert (handover.DIRECTORY, handover.GPU) == (places.HANDOVER, places.GPU)
    assert (handover.BLOBS, handover.INDEX) == (layout.BLOBS, layout.INDEX)
    assert handover.POOL.fullmatch(places.home("weights"))


def test_pools_of_the_tree_are_taken(store: Store) -> None:
    """Of the tree's processes and no others; only the index is copied, and the source keeps its files."""
    mine = store.pool("weights.17", {ONE: b"one", TWO: b"twotwo"})
    store.pool("weights.99", {ONE: b"x"})
    index = len((mine / "index.json").read_bytes())
    taken = store.adopt(17, 18)
    assert taken == Adopted(
        (f"gpu/weights.17/blobs/{ONE}", f"gpu/weights.17/blobs/{TWO}", "gpu/weights.17/index.json"), 9 + index
    )
    for path in taken.paths:
        assert (store.staging / path).samefile(mine.parent.parent / path) == ("/blobs/" in path)
    assert os.listdir(store.staging / "gpu") == ["weights.17"]


def test_what_no_index_names_is_left(store: Store) -> None:
    """Unfinished files, blobs of an earlier state, and other people's files stay where they are."""
    mine = store.pool("weights.17", {ONE: b"one", TWO: b"old", ".writing-1": b"half"}, named=[ONE, None])
    (mine / "notes").write_text("x")
    (mine.parent / "not-a-pool").mkdir()
    assert [path.rpartition("/")[2] for path in store.adopt(17).paths] == [ONE, "index.json"]


def test_no_pools_at_all(store: Store) -> None:
    """An application without pools has no handover directory."""
    assert store.adopt(17) == Adopted()
    discard(store.fd, "model")


def test_after_the_publication_the_handover_goes(store: Store) -> None:
    """The checkpoint's files are the only ones then; other checkpoints' handovers stay."""
    store.pool("weights.17", {ONE: b"one"})
    (store.path / ".handover" / "other").mkdir()
    taken = store.adopt(17)
    discard(store.fd, "model")
    assert {(store.staging / path).stat().st_nlink for path in taken.paths} == {1}
    assert os.listdir(store.path / ".handover") == ["other"]


def test_without_hard_links_files_are_copied(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without hard links costs a copy."""
    mine = store.pool("weights.17", {ONE: b"one" * 5_000_000})

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    for path in store.adopt(17).paths:
        copied = store.staging / path
        assert copied.read_bytes() == (mine.parent.parent / path).read_bytes()
        assert copied.stat().st_nlink == 1


def test_a_pool_that_is_not_whole(store: Store) -> None:
    """A missing blob fails the capture instead of making a checkpoint that cannot be restored."""
    store.pool("weights.17", {ONE: b"one"}, named=[ONE, TWO])
    with pytest.raises(CaptureFailed, match=f"{TWO} is missing") as caught:
        store.adopt(17)
    assert caught.value.reason is Reason.WRITE_FAILED


def test_a_pool_that_was_never_saved(store: Store) -> None:
    """Without an index the process kept its memory: there is nothing to take, and nothing is wrong."""
    (store.pool("weights.17", {ONE: b"one"}) / "index.json").unlink()
    store.pool("adapters.17", {TWO: b"two"})
    assert [path.rpartition("/")[0] for path in store.adopt(17).paths] == ["gpu/adapters.17/blobs", "gpu/adapters.17"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"blobs": 1}', '{"blobs": [{}]}', "[" * 100_000])
def test_an_index_that_is_none(store: Store, text: str) -> None:
    """What is no index fails the capture by name."""
    (store.pool("weights.17", {}) / "index.json").write_text(text)
    with pytest.raises(CaptureFailed, match="is no index of a pool"):
        store.adopt(17)


@pytest.mark.parametrize("name", ["../../../../secret", "/etc/passwd", "", "x", 5])
def test_names_that_lead_out(store: Store, name: object) -> None:
    """An index cannot name anything but blobs of its own directory."""
    store.pool("weights.17", {}, named=[name])
    with pytest.raises(CaptureFailed, match="which is no blob"):
        store.adopt(17)


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("kind", ["link", "fifo", "directory"])
def test_files_that_are_none(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, *, copied: bool
) -> None:
    """Links are not followed, FIFOs do not hold the capture up: only regular files are taken."""
    blobs = store.pool("weights.17", {}, named=[ONE]) / "blobs"
    secret = tmp_path / "secret"
    secret.write_text("secret")
    if kind == "link":
        (blobs / ONE).symlink_to(secret)
    elif kind == "fifo":
        os.mkfifo(blobs / ONE)
    else:
        (blobs / ONE).mkdir()
    if copied:

        def refuse(*_: object, **__: object) -> None:
            raise OSError(errno.EXDEV, "other file system")

        monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(CaptureFailed) as caught:
        store.adopt(17)
    assert caught.value.reason is Reason.WRITE_FAILED
    assert not (store.staging / "gpu/weights.17/blobs" / ONE).is_file()


@pytest.mark.parametrize("where", ["gpu", "gpu/weights.17", "gpu/weights.17/blobs"])
def test_directories_that_are_links(store: Store, tmp_path: Path, where: str) -> None:
    """No directory on the way may be a link."""
    store.pool("weights.17", {ONE: b"one"})
    path = store.path / ".handover" / "model" / where
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CaptureFailed):
        store.adopt(17)
