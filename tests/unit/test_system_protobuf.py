"""The wire codec: what goes in comes out, and nothing that others would read differently is accepted."""

# ruff: noqa: RUF009 - `nested` only describes a field

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chrek.system.protobuf import (
    BOOL,
    BYTES,
    FIXED32,
    FIXED64,
    INT,
    INT32,
    RAW,
    TEXT,
    UINT,
    UINT32,
    VARINT,
    ZIGZAG,
    Message,
    WireError,
    field,
    nested,
    raw_fields,
    read_varint,
    write_varint,
)


@dataclass
class Leaf(Message):
    number: int | None = field(1, UINT)
    text: str | None = field(2, TEXT)


@dataclass
class Everything(Message):
    uint: int | None = field(1, UINT)
    uint32: int | None = field(2, UINT32)
    int64: int | None = field(3, INT)
    int32: int | None = field(4, INT32)
    zigzag: int | None = field(5, ZIGZAG)
    flag: bool | None = field(6, BOOL)
    text: str | None = field(7, TEXT)
    raw: bytes | None = field(8, RAW)
    leaf: Leaf | None = nested(9, Leaf)
    numbers: list[int] = field(10, INT, repeated=True)
    texts: list[str] = field(11, TEXT, repeated=True)
    leaves: list[Leaf] = nested(2000, Leaf, repeated=True)


@dataclass
class Needy(Message):
    wanted: int = field(1, UINT, required=True)
    leaf: Leaf | None = nested(2, Leaf, required=True)


@dataclass
class Nothing(Message):
    """Knows no field: all it reads is unknown."""


U64, U32 = st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1)
I64, I32 = st.integers(-(2**63), 2**63 - 1), st.integers(-(2**31), 2**31 - 1)
# As the kernel gives names: any bytes, those that are no UTF-8 as surrogates.
NAMES = st.binary(max_size=12).map(lambda data: data.decode("utf-8", "surrogateescape"))
LEAVES = st.builds(Leaf, number=st.none() | U64, text=st.none() | NAMES)
MESSAGES = st.builds(
    Everything,
    uint=st.none() | U64,
    uint32=st.none() | U32,
    int64=st.none() | I64,
    int32=st.none() | I32,
    zigzag=st.none() | I64,
    flag=st.none() | st.booleans(),
    text=st.none() | NAMES,
    raw=st.none() | st.binary(max_size=12),
    leaf=st.none() | LEAVES,
    numbers=st.lists(I64, max_size=4),
    texts=st.lists(NAMES, max_size=3),
    leaves=st.lists(LEAVES, max_size=3),
)


@given(MESSAGES)
def test_round_trip(message: Everything) -> None:
    """What is encoded is decoded to the same message, unset fields staying unset."""
    assert Everything.decode(message.encode()) == message


@given(MESSAGES)
def test_unknown_fields_are_kept(message: Everything) -> None:
    """A schema that knows none of the fields writes the very bytes that it read."""
    data = message.encode()
    assert Nothing.decode(data).encode() == data


@given(MESSAGES, U64)
def test_editing_among_unknown_fields(message: Everything, number: int) -> None:
    """A schema that knows one field can change it, and every other field arrives as it was."""
    edited = Leaf.decode(Nothing.decode(Everything(leaves=message.leaves).encode()).encode())
    edited.number = number
    again = Everything.decode(edited.encode())
    assert again.uint == number
    assert again.leaves == message.leaves


def test_fixed_fields_are_kept() -> None:
    """Unknown fields of fixed width, which nothing here declares, survive too."""
    data = b"".join(
        [
            *(write_varint(3 << 3 | FIXED32), b"abcd"),
            *(write_varint(4 << 3 | FIXED64), b"abcdefgh"),
        ]
    )
    assert [wire for _, wire, _ in raw_fields(data)] == [FIXED32, FIXED64]
    assert Nothing.decode(data).encode() == data


@given(U64)
def test_varint(value: int) -> None:
    """A varint of up to ten bytes is read where it was written, and the offset after it is returned."""
    data = write_varint(value)
    assert len(data) == max(1, -(-value.bit_length() // 7))
    assert read_varint(b"x" + data + b"y", 1) == (value, 1 + len(data))


@given(st.binary(max_size=64))
def test_any_bytes(data: bytes) -> None:
    """Whatever the bytes are, decoding returns a message or raises WireError."""
    try:
        message = Everything.decode(data)
    except WireError:
        return
    assert Everything.decode(message.encode()) == message


@given(MESSAGES, st.data())
def test_truncated(message: Everything, data: st.DataObject) -> None:
    """A message that is cut short decodes to the fields before the cut, or raises WireError."""
    whole = message.encode()
    cut = whole[: data.draw(st.integers(0, len(whole)))]
    try:
        found = Everything.decode(cut)
    except WireError:
        return
    for each in fields(Everything):
        value = getattr(found, each.name)
        assert value in (None, [], b"", getattr(message, each.name)) or isinstance(value, list)


@given(st.lists(I64, max_size=6))
def test_packed(numbers: list[int]) -> None:
    """A repeated number may come packed, as proto3 sends it."""
    packed = b"".join(write_varint(number) for number in numbers)
    data = write_varint(10 << 3 | BYTES) + write_varint(len(packed)) + packed
    assert Everything.decode(data).numbers == numbers


@pytest.mark.parametrize(
    "data",
    [
        b"\x08\x01\x08\x01",  # a number, twice
        b"\x4a\x00\x4a\x00",  # a message, twice: others merge the two
        b"\x3a\x01a\x3a\x01b",
        b"\x4a\x04\x08\x01\x08\x02",  # within a nested message
    ],
)
def test_a_field_that_stands_twice(data: bytes) -> None:
    """A field that is not repeated and stands twice is refused: another decoder would see another message."""
    with pytest.raises(WireError, match="stands twice"):
        Everything.decode(data)


@pytest.mark.parametrize(("value", "seen"), [(1 << 32, 0), ((1 << 32) + 7, 7), ((1 << 64) - 1, (1 << 32) - 1)])
def test_width(value: int, seen: int) -> None:
    """A number wider than its 32-bit field is cut to it, as other decoders cut it."""
    assert Everything.decode(write_varint(2 << 3) + write_varint(value)).uint32 == seen


def test_negative_int32_of_four_bytes() -> None:
    """A negative number is the same whether it was sent sign-extended or not."""
    for value in ((1 << 64) - 1, (1 << 32) - 1):
        assert Everything.decode(write_varint(4 << 3) + write_varint(value)).int32 == -1


@pytest.mark.parametrize("data", [b"", b"\x08\x01", b"\x12\x00"])
def test_required(data: bytes) -> None:
    """A message without one of its required fields is refused."""
    with pytest.raises(WireError, match="is missing"):
        Needy.decode(data)
    assert Needy.decode(b"\x08\x01\x12\x00").wanted == 1


@pytest.mark.parametrize(
    "data",
    [
        b"\x0a\x00",  # bytes where a number should be
        b"\x38\x01",  # a number where text should be
        b"\x50\x01\x5d\x01\x01\x01\x01",  # 32 bits in a list of texts
        b"\x00\x01",  # field number 0
        b"\x0b",  # a group begins
        b"\x0f",  # no wire type
        b"\x08",  # no value
        b"\x42\x05abc",  # five bytes of which three are there
        b"\x08" + b"\x80" * 10 + b"\x01",  # a varint of eleven bytes
        b"\x52\x01\x80",  # a packed list that is cut short
    ],
)
def test_nonsense(data: bytes) -> None:
    """Wrong wire types, field number 0, groups and cut values are refused."""
    with pytest.raises(WireError):
        Everything.decode(data)


def test_wire_types_are_the_guides() -> None:
    """The four wire types have the numbers of the encoding guide."""
    assert (VARINT, FIXED64, BYTES, FIXED32) == (0, 1, 2, 5)
