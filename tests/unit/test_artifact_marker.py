"""The completion marker and the signal file."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from chrek.artifact import Marker, read_marker
from chrek.artifact.marker import read_sealed_marker
from chrek.errors import Reason, Refused

_MARKER = Marker(
    checkpoint_id="abc",
    checkpoint_path="/checkpoints/abc",
    timestamp="2026-01-31T12:00:00.000Z",
    success=True,
    manifest_sha256="0" * 64,
    extra={"pod_uid": "uid-1", "restarts": 3, "labels": {"a": "ä\udcff"}},
)


def test_a_marker_comes_back_equal_with_its_extra_keys() -> None:
    """What was written is what is read, sealed or not."""
    assert read_sealed_marker(_MARKER.to_sealed_json()) == _MARKER
    assert read_marker(_MARKER.to_json()) == _MARKER


def test_a_signal_file_of_a_failure_says_why() -> None:
    """The object is the contract's: five keys, the error only on failure."""
    failed = replace(_MARKER, success=False, manifest_sha256=None, error="no space", extra={})
    assert json.loads(failed.to_json()) == {
        "checkpoint_id": "abc",
        "checkpoint_path": "/checkpoints/abc",
        "timestamp": "2026-01-31T12:00:00.000Z",
        "success": False,
        "error": "no space",
    }
    assert "error" not in json.loads(_MARKER.to_json())


def test_every_flipped_bit_of_a_sealed_marker_is_found() -> None:
    """White space, values, extra keys, the seal itself: nothing can change unseen."""
    text = _MARKER.to_sealed_json()
    for index in range(len(text)):
        for bit in range(8):
            wrong = bytearray(text)
            wrong[index] ^= 1 << bit
            with pytest.raises(Refused):
                read_sealed_marker(bytes(wrong))


def test_a_truncated_or_extended_marker_is_found() -> None:
    """Every shorter text and an extra byte."""
    text = _MARKER.to_sealed_json()
    for wrong in (*(text[:length] for length in range(len(text))), text + b"\n", b" " + text):
        with pytest.raises(Refused):
            read_sealed_marker(wrong)


@pytest.mark.parametrize(
    "members",
    [
        {"checkpoint_id": "../x"},
        {"checkpoint_id": 3},
        {"timestamp": "now"},
        {"success": "true"},
        {"success": False},
        {"error": "both"},
        {"manifest_sha256": "xyz"},
        {"manifest_sha256": None},
    ],
)
def test_bad_members_are_refused(members: dict[str, Any]) -> None:
    """Types, forms and the contradiction of success and error."""
    with pytest.raises(Refused) as caught:
        read_marker(json.dumps(json.loads(_MARKER.to_json()) | members).encode())
    assert caught.value.reason is Reason.CORRUPT


@pytest.mark.parametrize("marker", [replace(_MARKER, manifest_sha256=None), replace(_MARKER, success=False, error="e")])
def test_a_marker_of_a_failure_or_without_a_manifest_completes_nothing(marker: Marker) -> None:
    """Only a success with the digest of a manifest makes a checkpoint."""
    with pytest.raises(Refused, match="not the sealed marker"):
        read_sealed_marker(marker.to_sealed_json())


def test_an_unsealed_marker_completes_nothing() -> None:
    """A signal file copied into the directory is not a completion marker."""
    with pytest.raises(Refused, match="not the sealed marker"):
        read_sealed_marker(replace(_MARKER, extra={"note": "seal"}).to_json())


@pytest.mark.parametrize("name", ["seal", "success", "error"])
def test_extra_keys_cannot_replace_our_own(name: str) -> None:
    """A caller's extra key with one of our names is a mistake of the caller."""
    with pytest.raises(ValueError, match=name):
        replace(_MARKER, extra={name: "x"}).to_sealed_json()
