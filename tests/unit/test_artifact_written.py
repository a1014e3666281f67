"""An older format is written for those who read no newer one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from chrek.artifact import FORMAT_VERSION, Level
from chrek.store import Store, open_checkpoint

TESTS = Path(__file__).resolve().parents[1]
RECORDED = TESTS / "unit/inputs/checkpoint-1-sha256.tar.xz"
WRITE = """
import sys
sys.path[:0] = sys.argv[2:]
from chrek.artifact import WRITTEN, FileEntry
from chrek.artifact.digest import BULK_LIMIT, FASTEST, hash_file
from chrek.memory.index import Index, decode
from chrek.store import Store
from sample_store import CONTENTS, publish
import os, tempfile
with tempfile.TemporaryFile() as file:
    file.truncate(BULK_LIMIT)
    entry = hash_file(file.fileno())
print(WRITTEN, FASTEST.value, entry.digest)
index = Index(block_size=1 << 22, files=(), pids=(), ends=(), algorithm=FASTEST, digests=b"", runs=b"")
print(int.from_bytes(index.encode()[8:12], "little"), decode(index.encode()).algorithm.value)
with Store.open(sys.argv[1], create=True) as store:
    publish(store, "one")
"""


def write(store: Path, written: str | None) -> subprocess.CompletedProcess[str]:
    """Publish a checkpoint in a process that writes this format."""
    env = {name: value for name, value in os.environ.items() if name != "CHREK_WRITE_FORMAT"}
    if written is not None:
        env["CHREK_WRITE_FORMAT"] = written
    source = str(TESTS.parent / "src")
    command = [sys.executable, "-c", WRITE, str(store), source, str(TESTS)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_first_format_is_written_as_it_was(tmp_path: Path) -> None:
    """Version numbers, digests and keys are those that a recorded checkpoint of the first format has; it is read here."""
    done = write(tmp_path, "1")
    assert done.stdout == "1 sha256 None\n1 sha256\n", done.stderr
    text = json.loads((tmp_path / "one" / "manifest.json").read_text())
    with tarfile.open(RECORDED) as archive:
        name = next(each for each in archive.getnames() if each.endswith("/manifest.json"))
        member = archive.extractfile(name)
        assert member is not None
        recorded = json.load(member)
    assert text["format_version"] == recorded["format_version"] == 1
    known = {key for entry in recorded["files"].values() for key in entry}
    assert {key for entry in text["files"].values() for key in entry} <= known
    with Store.open(tmp_path) as store, open_checkpoint(store, "one") as found:
        assert found.manifest.format_version == 1
        assert found.verify(Level.FULL).ok


def test_newest_format_is_the_default(tmp_path: Path) -> None:
    """Without a word the newest one is written."""
    assert write(tmp_path, None).stdout.startswith(f"{FORMAT_VERSION} ")


@pytest.mark.parametrize("written", ["0", str(FORMAT_VERSION + 1), "one", ""])
def test_format_that_does_not_exist(tmp_path: Path, written: str) -> None:
    """A number that is none is refused before anything is written."""
    done = write(tmp_path / "store", written)
    assert done.returncode != 0
    assert "CHREK_WRITE_FORMAT" in done.stderr
    assert not (tmp_path / "store").exists()
