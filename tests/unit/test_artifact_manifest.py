"""The manifest is read strictly, and its version before anything else."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from chrek.artifact import FORMAT_VERSION, FileEntry, strictjson
from chrek.artifact.manifest import read_manifest
from chrek.errors import Reason, Refused
from sample_store import CONTENTS, bulk_entry, make_manifest

if TYPE_CHECKING:
    from collections.abc import Callable

_ENTRY = FileEntry.of_bytes(b"")
_FILES = {path: bulk_entry(data) if "memory/" in path else FileEntry.of_bytes(data) for path, data in CONTENTS.items()}


def _members() -> dict[str, Any]:
    members: dict[str, Any] = json.loads(make_manifest("abc", _FILES).to_json())
    return members


def test_a_manifest_comes_back_equal() -> None:
    """What was written is what is read, non-UTF-8 command lines included."""
    manifest = make_manifest("abc", _FILES)
    assert read_manifest(manifest.to_json()) == manifest


def test_the_version_stands_first() -> None:
    """People see the version in the first lines of the file."""
    assert make_manifest("abc", _FILES).to_json().startswith(b'{\n  "format_version": 2,\n')


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 2**62])
def test_a_newer_version_is_refused_by_name_before_the_rest_is_looked_at(version: int) -> None:
    """A newer manifest may look quite different; only its version counts."""
    text = json.dumps({"format_version": version, "everything": "else"}).encode()
    with pytest.raises(Refused) as caught:
        read_manifest(text)
    assert caught.value.reason is Reason.FORMAT_TOO_NEW
    assert str(version) in caught.value.message


@pytest.mark.parametrize("version", ["0", "true", '"1"', "-1", "1.0", "null", "[1]"])
def test_without_a_good_version_it_is_no_manifest(version: str) -> None:
    """Anything without a positive integer there is corrupt."""
    with pytest.raises(Refused) as caught:
        read_manifest(b'{"format_version": %b}' % version.encode())
    assert caught.value.reason is Reason.CORRUPT


@pytest.mark.parametrize("text", ["{}", "[]", "1", "null"])
def test_another_document_is_no_manifest(text: str) -> None:
    """Neither is one without any version."""
    with pytest.raises(Refused, match="has no format_version"):
        read_manifest(text.encode())


def _set(*keys: str | int, to: object) -> Callable[[dict[str, Any]], None]:
    def change(members: dict[str, Any]) -> None:
        place: Any = members
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = to

    return change


@pytest.mark.parametrize(
    "change",
    [
        _set("checkpoint_id", to="../other"),
        _set("checkpoint_id", to=""),
        _set("created", to="yesterday"),
        _set("files", "/etc/passwd", to={"size": 0, "sha256": "0" * 64}),
        _set("files", "../../etc/passwd", to={"size": 0, "sha256": "0" * 64}),
        _set("files", "images/../x", to={"size": 0, "sha256": "0" * 64}),
        _set("files", "images//x", to={"size": 0, "sha256": "0" * 64}),
        _set("files", "images/./x", to={"size": 0, "sha256": "0" * 64}),
        _set("files", "nul\0", to={"size": 0, "sha256": "0" * 64}),
        _set("files", "manifest.json", to={"size": 0, "sha256": "0" * 64}),
        _set("files", "checkpoint.done", to={"size": 0, "sha256": "0" * 64}),
        _set("files", "dump.log/x", to={"size": 0, "sha256": "0" * 64}),
        _set("files", "x", to={"size": -1, "sha256": "0" * 64}),
        _set("files", "x", to={"size": 2**63, "sha256": "0" * 64}),
        _set("files", "x", to={"size": 2**62, "block_size": 65536, "blocks": ""}),
        _set("files", "x", to={"size": 1, "sha256": "0" * 64, "mode": 511}),
        _set("files", to=[]),
        _set("memory", "shards", to=["memory/none"]),
        _set("memory", "mode", to="other"),
        _set("memory", "bytes", to=1.5),
        _set("volumes", 0, "archive", to="/etc/shadow"),
        _set("side_files", 0, "file", to="../x"),
        _set("application", "root_pid", to="7"),
        _set("application", "new_section", to={}),
        _set("facts", "new_fact", to=1),
        _set("new_section", to={}),
        _set("open_files", 0, "size", to=None),
        _set("provenance", "command", to="python3"),
        _set("provenance", "phases", to={"dump": "fast"}),
    ],
)
def test_a_manifest_with_one_bad_member_is_refused(change: Callable[[dict[str, Any]], None]) -> None:
    """Traversal, contradictions, unknown obligations and wrong types are all found."""
    members = _members()
    change(members)
    with pytest.raises(Refused) as caught:
        read_manifest(json.dumps(members).encode())
    assert caught.value.reason is Reason.CORRUPT


@pytest.mark.parametrize(
    "section", ["provenance", "facts", "application", "memory", "files", "checkpoint_id", "created"]
)
def test_every_section_without_a_default_is_required(section: str) -> None:
    """A manifest without it is refused, and the message names it."""
    members = _members()
    del members[section]
    with pytest.raises(Refused, match=section):
        read_manifest(json.dumps(members).encode())


def test_sections_that_only_inform_may_have_keys_of_newer_writers() -> None:
    """Provenance and the processes' summaries are open."""
    members = _members()
    members["provenance"]["weather"] = "rain"
    members["application"]["processes"][0]["colour"] = ["red"]
    assert read_manifest(json.dumps(members).encode()) == make_manifest("abc", _FILES)


def test_a_manifest_that_no_reader_would_take_is_not_written() -> None:
    """The writer reads back what it writes, so limits are found at the capture and not at the restore."""
    files = {f"images/{number}": _ENTRY for number in range(250_000)}
    with pytest.raises(Refused) as caught:
        make_manifest("abc", files).to_json()
    assert caught.value.reason is Reason.CORRUPT


def test_a_terabyte_of_shards_fits_the_bounds() -> None:
    """256 shards of 4 GiB in blocks of 4 MiB: the manifest is below half of the limit."""
    entry = FileEntry(size=4 << 30, block_size=4 << 20, digest="sha256", blocks=bytes(32 * 1024))
    text = make_manifest("abc", {f"memory/{number}": entry for number in range(256)}).to_json()
    assert len(text) < strictjson.MAX_BYTES / 2
    assert read_manifest(text).stored_bytes == 1 << 40
