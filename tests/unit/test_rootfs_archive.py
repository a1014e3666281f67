"""Archives of files: what is written is read back, by others too, and everything else is refused."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chrek.artifact.digest import FileEntry, hash_file
from chrek.errors import Reason, Refused
from chrek.rootfs import Journal, apply, pack_tree
from chrek.rootfs.archive import Archive, read_archive
from chrek.rootfs.member import ArchiveKind, Kind, Member, archive_header, encode, padding, trailer
from chrek.rootfs.meta import Meta
from chrek.rootfs.skip import Skip
from rootfs_trees import directory, memory_file, snapshot

META = Meta(0o644, 0, 0, 1_700_000_000_123_456_789)
ROOT = Member(b"", Kind.DIRECTORY, Meta(0o755, 0, 0, 0))


def build(*members: Member, kind: ArchiveKind = ArchiveKind.OVERLAY, content: bytes = b"") -> bytes:
    """Write an archive; every file member has *content* as far as its size asks for it."""
    data = archive_header(kind)
    for member in members:
        data += encode(member) + content[: member.stored].ljust(member.stored, b"\0") + padding(member.stored)
    return data + trailer(len(data))


def read(data: bytes) -> Archive:
    """Read an archive out of memory."""
    with memory_file() as fd:
        os.write(fd, data)
        return read_archive(fd)


def assert_corrupt(data: bytes, *, saying: str = "") -> None:
    """Assert that an archive is refused as corrupt, with a message that says this."""
    with pytest.raises(Refused) as caught:
        read(data)
    assert caught.value.reason is Reason.CORRUPT
    assert "rootfs.tar" in caught.value.message
    assert saying in caught.value.message


names = (
    st.binary(min_size=1, max_size=255)
    .map(lambda b: b.replace(b"\0", b"x").replace(b"/", b"y"))
    .filter(lambda b: b not in (b".", b".."))
)
metas = st.builds(
    Meta,
    st.integers(0, 0o7777),
    st.integers(0, 0xFFFFFFFE),
    st.integers(0, 0xFFFFFFFE),
    st.integers(-(2**62), 2**62),
    st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30).map("user.".__add__),
        st.binary(max_size=300),
        max_size=3,
    ).map(lambda found: tuple(sorted(found.items()))),
)


@st.composite
def members(draw: st.DrawFn) -> Member:
    """Draw a member of any kind."""
    kind = draw(st.sampled_from([Kind.FILE, Kind.SYMLINK, Kind.DIRECTORY, Kind.FIFO, Kind.SOCKET, Kind.CHAR_DEVICE]))
    member = Member(draw(names), kind, draw(metas))
    if kind is Kind.FILE:
        member.size = draw(st.integers(0, 2000))
        if draw(st.booleans()):
            member.segments = ((0, member.size // 3), (member.size // 2, member.size // 4), (member.size, 0))
    elif kind is Kind.SYMLINK:
        member.link = draw(st.binary(min_size=1, max_size=4000).map(lambda b: b.replace(b"\0", b"x")))
    elif kind is Kind.CHAR_DEVICE:
        member.device = (draw(st.integers(1, 4095)), draw(st.integers(0, 2**20 - 1)))
    elif kind is Kind.DIRECTORY:
        member.opaque = draw(st.booleans())
    return member


@settings(max_examples=300)
@given(members())
def test_any_member_comes_back_as_it_was(member: Member) -> None:
    """What is encoded is decoded to the same member, whatever its name, owner, time and attributes."""
    assert read(build(ROOT, member)).members == (ROOT, member)


@settings(max_examples=100)
@given(members())
def test_python_reads_it(member: Member) -> None:
    """Python's own tarfile finds the same name, mode, owner, type and size."""
    with tarfile.open(fileobj=io.BytesIO(build(ROOT, member))) as tar:
        found = tar.getmembers()[1]
    assert os.fsencode(found.name) == member.path
    assert (found.mode, found.uid, found.gid) == (member.meta.mode, member.meta.uid, member.meta.gid)
    assert found.size == member.size
    assert abs(found.mtime - member.meta.mtime_ns / 1e9) < 1e-3 * max(1, abs(found.mtime))


def test_gnu_tar_reads_names_and_holes(tmp_path: Path) -> None:
    """GNU tar extracts names that are not UTF-8, long names, links, and a sparse file with its content."""
    sparse = Member(b"sparse", Kind.FILE, META, size=100_000, segments=((50_000, 5), (100_000, 0)))
    odd = Member(b"odd-\xff\n", Kind.SYMLINK, META, link=b"n" * 300)
    long = Member(b"d" * 255, Kind.FILE, META, size=5)
    link = Member(b"hard", Kind.HARD_LINK, META, link=b"d" * 255)
    (tmp_path / "a.tar").write_bytes(build(ROOT, sparse, odd, long, link, content=b"12345"))
    (tmp_path / "out").mkdir()
    subprocess.run(["tar", "-xf", "a.tar", "-C", "out"], cwd=tmp_path, check=True, capture_output=True)
    out = os.fsencode(tmp_path / "out")
    with open(out + b"/sparse", "rb") as file:
        assert file.read() == bytes(50_000) + b"12345" + bytes(49_995)
    assert os.readlink(out + b"/odd-\xff\n") == b"n" * 300
    assert os.stat(out + b"/hard").st_ino == os.stat(out + b"/" + b"d" * 255).st_ino
    assert os.stat(out + b"/hard").st_mtime_ns == META.mtime_ns


GOOD = build(
    ROOT,
    Member(b"d", Kind.DIRECTORY, META, opaque=True),
    Member(b"d/f", Kind.FILE, META, size=700),
    Member(b"d/h", Kind.HARD_LINK, META, link=b"d/f"),
    Member(b"gone", Kind.WHITEOUT, Meta(0, 0, 0, 0)),
    Member(b"s", Kind.FILE, META, size=9000, segments=((4096, 100), (9000, 0))),
)


def test_every_truncation_is_refused() -> None:
    """An archive that ends anywhere before its end is refused."""
    for size in [*range(0, len(GOOD), 97), len(GOOD) - 1]:
        assert_corrupt(GOOD[:size])


def test_every_flipped_byte_of_a_header_is_refused_or_harmless() -> None:
    """A flipped byte never gives a crash or a member outside the tree, and content is not looked at."""
    plain = read(GOOD).members
    for at in range(0, len(GOOD), 3):
        flipped = bytearray(GOOD)
        flipped[at] ^= 0x11
        with contextlib.suppress(Refused):
            found = read(bytes(flipped)).members
            assert len(found) == len(plain)
            assert all(b".." not in member.path.split(b"/") for member in found)


@pytest.mark.parametrize(
    "path",
    [b"/abs", b"../up", b"d/../../up", b"d//x", b"./x", b"d/.", b"..", b"x" * 256, b"a\0" + b"b" * 150],
    ids=lambda path: repr(path[:10]),
)
def test_paths_that_leave_the_tree_are_refused(path: bytes) -> None:
    """Absolute paths, dot components, empty, overlong and NUL-holding ones are refused."""
    parent = Member(b"d", Kind.DIRECTORY, META)
    assert_corrupt(build(ROOT, parent, Member(path, Kind.FILE, META)))


def other(path: bytes = b"f", **values: object) -> Member:
    """Make a file member with odd values."""
    return Member(path, Kind.FILE, META, **values)  # type: ignore[arg-type]


def with_attribute(name: str) -> Member:
    """Make a file member with an extended attribute."""
    return Member(b"f", Kind.FILE, Meta(0, 0, 0, 0, ((name, b"x"),)))


@pytest.mark.parametrize(
    ("saying", "data"),
    [
        ("twice", build(ROOT, other(), other())),
        ("before its directory", build(ROOT, other(b"d/f"))),
        ("before its directory", build(ROOT, other(b"d"), other(b"d/f"))),
        ("root", build(ROOT, ROOT)),
        ("before its directory", build(other())),
        ("joins no file", build(ROOT, Member(b"h", Kind.HARD_LINK, META, link=b"../../etc/shadow"))),
        ("joins no file", build(ROOT, Member(b"h", Kind.HARD_LINK, META, link=b"later"), other(b"later"))),
        ("link target", build(ROOT, other(link=b"x"))),
        ("possible target", build(ROOT, Member(b"l", Kind.SYMLINK, META, link=b"x" * 4096))),
        ("segments", build(ROOT, other(size=10, segments=((0, 5), (3, 2))))),
        ("segments", build(ROOT, other(size=10, segments=((8, 5),)))),
        ("mode or time", build(ROOT, Member(b"f", Kind.FILE, Meta(0o10644, 0, 0, 0)))),
        ("owner", build(ROOT, Member(b"f", Kind.FILE, Meta(0o644, 0xFFFFFFFF, 0, 0)))),
        ("belongs to overlayfs", build(ROOT, with_attribute("trusted.overlay.redirect"))),
        ("not one that travels", build(ROOT, with_attribute("security.selinux"))),
        ("no members", build()),
        ("end", build(ROOT) + b"x" * 10240),
        ("end", build(ROOT) + bytes(10240)),
    ],
)  # fmt: skip
def test_malformed_members_are_refused(saying: str, data: bytes) -> None:
    """Duplicates, orphans, bad links, bad maps, bad numbers and foreign attributes are refused by name."""
    assert_corrupt(data, saying=saying)


def _tarfile(fill: Callable[[tarfile.TarFile], None], form: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form, pax_headers={"comment": "chrek-files 1 overlay"}) as tar:
        fill(tar)
    return file.getvalue()


def _info(name: str, **values: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in values.items():
        setattr(info, key, value)
    return info


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_archives_of_strangers_are_refused(form: int) -> None:
    """A tar that another program wrote is no archive of ours, even with our comment in front."""
    assert_corrupt(_tarfile(lambda tar: tar.addfile(_info("etc/passwd")), form))
    assert_corrupt(_tarfile(lambda tar: tar.addfile(_info("x" * 300)), form) if form != tarfile.USTAR_FORMAT else b"")


def test_gigantic_sizes_are_refused_at_once() -> None:
    """A size or a count that the archive's own length cannot hold is refused without an allocation."""
    header = encode(other(size=1 << 50))
    assert_corrupt(archive_header(ArchiveKind.OVERLAY) + encode(ROOT) + header + bytes(10240), saying="longer than")
    sparse = encode(other(size=1 << 40, segments=((1 << 39, 1),))).replace(b"1\n549755813888", b"4000000000\n5497")
    assert_corrupt(archive_header(ArchiveKind.OVERLAY) + encode(ROOT) + sparse + bytes(10240))


def test_a_newer_format_is_refused_by_name() -> None:
    """An archive of a later format says so, and is not called corrupt."""
    data = build(ROOT).replace(b"chrek-files 1", b"chrek-files 2")
    with pytest.raises(Refused, match="format 2") as caught:
        read(data)
    assert caught.value.reason is Reason.FORMAT_TOO_NEW


def test_whiteouts_mean_something_in_overlay_archives_only() -> None:
    """The content of a volume may hold a device 0:0, a nested overlay's whiteout, as an ordinary file."""
    device = Member(b"w", Kind.CHAR_DEVICE, META)
    assert read(build(ROOT, device)).members[1].kind is Kind.WHITEOUT
    assert read(build(ROOT, device, kind=ArchiveKind.TREE)).members[1].kind is Kind.CHAR_DEVICE


def test_whole_and_block_digests_are_those_of_the_file(tmp_path: Path) -> None:
    """The digest made while writing is the one that reading the archive gives, in either form."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "big").write_bytes(os.urandom(9_000_001))
    (source / "small").write_bytes(b"x" * 1000)
    descriptor = os.open(source, os.O_RDONLY)
    try:
        for blocks in (False, True):
            with memory_file() as fd:
                packed = pack_tree(descriptor, fd, blocks=blocks)
                entry = hash_file(fd) if blocks else FileEntry.of_bytes(os.pread(fd, packed.size, 0))
                assert packed.entry == entry
                assert packed.size == os.fstat(fd).st_size
    finally:
        os.close(descriptor)


def test_a_tree_is_carried_and_undone_without_privilege(tmp_path: Path) -> None:
    """A volume of the program's own user needs no capability in either direction."""
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "d" / "e").mkdir(parents=True)
    (source / "d" / "f").write_text("content")
    (source / "d" / "link").symlink_to("f")
    (source / "d").chmod(0o755)
    target.mkdir()
    before = snapshot(target)
    with memory_file() as fd, directory(source) as root, directory(target) as other_root:
        pack_tree(root, fd)
        with Journal(other_root) as journal:
            apply(read_archive(fd), journal)
            assert {p: v for p, v in snapshot(target).items() if b"chrek" not in p} == snapshot(source)
            journal.undo()
        assert snapshot(target) == before


@pytest.mark.parametrize(
    ("patterns", "left_out"),
    [
        ([], set()),
        (["*.log"], {b"a.log", b"var/x.log"}),
        (["/var"], {b"var"}),
        (["/var/*"], {b"var/x.log", b"var/y"}),
        (["y", "/a.?og"], {b"var/y", b"a.log"}),
    ],
)
def test_patterns_match_names_or_whole_paths(patterns: list[str], left_out: set[bytes]) -> None:
    """A pattern with a leading slash is compared with the path, any other with the last name."""
    skip = Skip((), patterns)
    paths = [b"a.log", b"var", b"var/x.log", b"var/y", b"b"]
    assert {path for path in paths if skip(path, path.split(b"/")[-1])} == left_out
