"""The cache of kernel features that CRIU is given: kept where only we can write, lent where CRIU looks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from chrek.criu import features
from chrek.criu.bundle import Bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """Return a directory that is named like a bundle; nothing is run here."""
    place = tmp_path / "bundle"
    place.mkdir()
    (place / "criu").write_bytes(b"a program")
    return Bundle(place)


@pytest.fixture
def kept(tmp_path: Path, bundle: Bundle) -> Path:
    """Return a directory with a cache for the bundle."""
    place = tmp_path / "kept"
    place.mkdir(mode=0o700)
    file = features.path_of(bundle, place)
    file.write_bytes(b"what CRIU found")
    file.chmod(0o600)
    return place


def test_what_is_kept_is_loaded(bundle: Bundle, kept: Path) -> None:
    """A cache of this boot and this program, in a directory of ours, is returned as it is."""
    assert features.load(bundle, kept) == b"what CRIU found"


@pytest.mark.parametrize("mode", [0o720, 0o702])
def test_directory_of_others(bundle: Bundle, kept: Path, mode: int) -> None:
    """A cache in a directory that others can write to is not used."""
    kept.chmod(mode)
    assert features.load(bundle, kept) is None


def test_file_of_others(bundle: Bundle, kept: Path) -> None:
    """A cache that others can write to is not used."""
    features.path_of(bundle, kept).chmod(0o622)
    assert features.load(bundle, kept) is None


def test_link_and_fifo(bundle: Bundle, kept: Path, tmp_path: Path) -> None:
    """Neither a link nor a FIFO in the cache's place is followed or waited for."""
    file = features.path_of(bundle, kept)
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert features.load(bundle, kept) is None
    file.unlink()
    os.mkfifo(file, 0o600)
    assert features.load(bundle, kept) is None


def test_another_program_has_another_cache(bundle: Bundle, kept: Path) -> None:
    """A CRIU that was replaced gets no cache of its predecessor."""
    (bundle.path / "criu").write_bytes(b"another program")
    assert features.load(bundle, kept) is None


def test_lent_for_a_block(bundle: Bundle, kept: Path, tmp_path: Path) -> None:
    """CRIU's directory has the cache while CRIU works, whatever lay there before, and nothing of it afterwards."""
    work = tmp_path / "work"
    work.mkdir()
    (work / features.NAME).symlink_to(tmp_path / "target")
    (work / f"{features.NAME}.tmp").write_bytes(b"")
    fd = os.open(work, os.O_RDONLY)
    with features.lend(bundle, fd, kept) as lent:
        assert lent
        assert (work / features.NAME).read_bytes() == b"what CRIU found"
    os.close(fd)
    assert not list(work.iterdir())
    assert not (tmp_path / "target").exists()


def test_nothing_to_lend(bundle: Bundle, tmp_path: Path) -> None:
    """Without a cache the directory stays empty."""
    work = tmp_path / "work"
    work.mkdir()
    fd = os.open(work, os.O_RDONLY)
    with features.lend(bundle, fd, tmp_path / "none") as lent:
        assert not lent
        assert not list(work.iterdir())
    os.close(fd)
