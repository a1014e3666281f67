"""Lines of mountinfo."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chrek.system import mounts
from chrek.system.mounts import Mount, parse, unescape

LINE = r"36 35 98:0 /mnt1\040x /mnt2\134a\011b\012c rw,noatime master:1 propagate_from:2 - ext3 /dev/ro\040ot rw,errors=continue"


def test_line() -> None:
    """A line is taken apart as proc(5) says, any number of optional fields passed over and escapes undone."""
    assert parse(LINE) == Mount(
        id=36,
        parent=35,
        device="98:0",
        root="/mnt1 x",
        point="/mnt2\\a\tb\nc",
        options=("rw", "noatime"),
        kind="ext3",
        source="/dev/ro ot",
        super_options=("rw", "errors=continue"),
    )


def test_line_without_optional_fields() -> None:
    """A line without optional fields has the same parts."""
    found = parse("25 0 0:21 / / rw shared:1 - overlay overlay rw,lowerdir=/a:/b,upperdir=/u,workdir=/w")
    assert "upperdir=/u" in found.super_options
    assert parse("25 0 0:21 / / rw - overlay overlay rw").point == "/"


@pytest.mark.parametrize("text", ["25 0 0:21 / / rw - tmpfs  rw", "25 0 0:21 / / rw - tmpfs none"])
def test_odd_sources(text: str) -> None:
    """A mount may have an empty source, and a line may end early."""
    assert parse(text).kind == "tmpfs"


@pytest.mark.parametrize(("options", "of_super", "wanted"), [("rw", "rw", False), ("ro", "rw", True), ("rw", "ro", True)])
def test_read_only(options: str, of_super: str, wanted: bool) -> None:
    """A mount is read-only when it is mounted so, or its file system is."""
    assert parse(f"1 0 0:1 / /x {options},nosuid - tmpfs tmpfs {of_super},size=4k").read_only is wanted


@given(st.text(st.characters(exclude_characters="\0", codec="utf-8")))
def test_unescape(text: str) -> None:
    """Any name that is escaped as the kernel does it comes back."""
    escaped = "".join(f"\\{ord(letter):03o}" if letter in " \t\n\\" else letter for letter in text)
    assert unescape(escaped) == text


def test_own_mounts() -> None:
    """The mounts of a process have a root and a /proc, each with an id of its own."""
    found = mounts.mounts(os.getpid())
    points = {mount.point: mount for mount in found}
    assert points["/proc"].kind == "proc"
    assert "/" in points
    assert len({mount.id for mount in found}) == len(found)


def test_a_process_that_is_gone() -> None:
    """A process that is no more has no mounts."""
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(pid, 0)
    assert mounts.mounts(pid) == []
