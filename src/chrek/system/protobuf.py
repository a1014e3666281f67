"""A small protobuf wire codec, for the few messages that ChReK exchanges with other programs.

Why not the protobuf package: CRIU's messages are read inside other people's containers, where the base
install may depend on nothing but the standard library; and code that a compiler generates has to be
made in every build. Only the kinds of fields that CRIU and the container runtime interface use are here.

Messages are dataclasses whose fields come from `field` and `nested`. A field that the sender did not set
is ``None`` (proto3 does not send zeros and empty strings: they arrive as ``None`` too); fields a schema
does not name are kept as raw bytes and written back, so that what is read, edited and written loses nothing.

Messages are also checked here before a privileged program reads the same bytes, so decoding must never see
less than other decoders do. A field that is not repeated and yet stands twice is refused: others merge the two
messages, or take the first. An integer is cut to the width of its field, as others cut it. A required field
that is missing is refused, as others refuse it.

Source: the protobuf encoding guide.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, Self

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

_U64 = (1 << 64) - 1


class WireError(ValueError):
    """The bytes are not the message they should be."""


def read_varint(data: bytes | memoryview, offset: int) -> tuple[int, int]:
    """Return the varint at *offset* and the offset after it."""
    value = shift = 0
    while True:
        if offset >= len(data) or shift > 63:
            raise WireError(f"broken varint at byte {offset}")
        byte = data[offset]
        offset += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & _U64, offset
        shift += 7


def write_varint(value: int) -> bytes:
    """Encode *value*; negative numbers take ten bytes, as protobuf wants it."""
    value &= _U64
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def raw_fields(data: bytes | memoryview) -> Iterator[tuple[int, int, int | bytes]]:
    """Yield (number, wire type, value) of each field in *data*, in order."""
    offset = 0
    while offset < len(data):
        key, offset = read_varint(data, offset)
        number, wire = key >> 3, key & 7
        if not number:
            raise WireError("field number 0")
        if wire == VARINT:
            value, offset = read_varint(data, offset)
            yield number, wire, value
            continue
        if wire == BYTES:
            size, offset = read_varint(data, offset)
        elif wire in (FIXED64, FIXED32):
            size = 8 if wire == FIXED64 else 4
        else:
            raise WireError(f"wire type {wire}")
        if offset + size > len(data):
            raise WireError(f"field {number} of {size} bytes runs past the end")
        yield number, wire, bytes(data[offset : offset + size])
        offset += size


def _write_raw(number: int, wire: int, value: int | bytes) -> bytes:
    key = write_varint(number << 3 | wire)
    if isinstance(value, int):
        return key + write_varint(value)
    if wire == BYTES:
        return key + write_varint(len(value)) + value
    return key + value


@dataclasses.dataclass(frozen=True)
class Kind:
    """How one field's value goes to the wire and back."""

    wire: int
    decode: Callable[[Any], Any]
    encode: Callable[[Any], int | bytes]


def _signed(bits: int) -> Callable[[int], int]:
    def decode(value: int) -> int:
        value &= (1 << bits) - 1
        return value - (1 << bits) if value >> (bits - 1) else value

    return decode


UINT = Kind(VARINT, int, int)
UINT32 = Kind(VARINT, lambda v: v & 0xFFFFFFFF, int)
INT = Kind(VARINT, _signed(64), int)
# An int32 is sent sign-extended to 64 bits, but CRIU also sends it as 32: both decode alike.
INT32 = Kind(VARINT, _signed(32), int)
ZIGZAG = Kind(VARINT, lambda v: (v >> 1) ^ -(v & 1), lambda v: (v << 1) ^ (v >> 63))
BOOL = Kind(VARINT, bool, int)
# Paths and command names are bytes to the kernel: what is not UTF-8 must survive the round trip.
TEXT = Kind(BYTES, lambda v: v.decode("utf-8", "surrogateescape"), lambda v: v.encode("utf-8", "surrogateescape"))
RAW = Kind(BYTES, bytes, bytes)


@dataclasses.dataclass(frozen=True)
class Declared:
    """A field as its message declares it."""

    number: int
    kind: Kind
    repeated: bool
    required: bool


def field(
    number: int, kind: Kind, *, repeated: bool = False, required: bool = False
) -> Any:  # noqa: ANN401 - stands for the field's own type
    """Declare a field of a `Message`: ``None`` (or an empty list) until it is set; proto2 may require it."""
    metadata = {"declared": Declared(number, kind, repeated, required)}
    if repeated:
        return dataclasses.field(default_factory=list, metadata=metadata)
    return dataclasses.field(default=None, metadata=metadata)


def nested(number: int, schema: type[Message], *, repeated: bool = False, required: bool = False) -> Any:  # noqa: ANN401 - as above
    """Declare a field that holds another message."""
    return field(number, Kind(BYTES, schema.decode, lambda m: m.encode()), repeated=repeated, required=required)


@dataclasses.dataclass
class Message:
    """Base of all messages; subclasses are dataclasses too."""

    _schema: ClassVar[dict[int, tuple[str, Declared]] | None] = None

    unknown: bytes = dataclasses.field(default=b"", repr=False, kw_only=True)

    @classmethod
    def schema(cls) -> dict[int, tuple[str, Declared]]:
        """Return {field number: (name, what is declared)}."""
        if "_schema" not in cls.__dict__ or cls._schema is None:
            declared = [(f.name, f.metadata["declared"]) for f in dataclasses.fields(cls) if f.metadata]
            cls._schema = {each.number: (name, each) for name, each in declared}
        return cls._schema

    @classmethod
    def decode(cls, data: bytes | memoryview) -> Self:
        """Decode *data*.

        Raises:
            WireError: it is not such a message.
        """
        schema, result, unknown, seen = cls.schema(), cls(), bytearray(), set()
        for number, wire, value in raw_fields(data):
            known = schema.get(number)
            if known is None:
                unknown += _write_raw(number, wire, value)
                continue
            name, declared = known
            kind = declared.kind
            if declared.repeated and wire == BYTES and kind.wire == VARINT:
                getattr(result, name).extend(kind.decode(item) for item in _packed(value))
                continue
            _check_wire(cls, name, kind, wire)
            if declared.repeated:
                getattr(result, name).append(kind.decode(value))
                continue
            if number in seen:
                raise WireError(f"{cls.__name__}.{name} stands twice")
            seen.add(number)
            setattr(result, name, kind.decode(value))
        for number, (name, declared) in schema.items():
            if declared.required and number not in seen:
                raise WireError(f"{cls.__name__}.{name} is missing")
        result.unknown = bytes(unknown)
        return result

    def encode(self) -> bytes:
        """Encode every field that is set, then what was unknown."""
        out = bytearray()
        for number, (name, declared) in self.schema().items():
            value, kind = getattr(self, name), declared.kind
            values: Iterable[Any] = value if declared.repeated else () if value is None else (value,)
            for item in values:
                out += _write_raw(number, kind.wire, kind.encode(item))
        return bytes(out) + self.unknown


def _check_wire(cls: type[Message], name: str, kind: Kind, wire: int) -> None:
    if wire != kind.wire:
        raise WireError(f"{cls.__name__}.{name} has wire type {wire}, not {kind.wire}")


def _packed(value: int | bytes) -> Iterator[int]:
    data, offset = bytes(value) if isinstance(value, bytes) else b"", 0
    while offset < len(data):
        item, offset = read_varint(data, offset)
        yield item
