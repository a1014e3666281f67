"""Messages: what is declared of them is what CRIU's own descriptors say."""

# ruff: noqa: RUF009 - `nested` only describes a field

from __future__ import annotations

import ast
import inspect
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from chrek.criu import messages
from chrek.engine import contents
from chrek.system import protobuf
from chrek.system.protobuf import BOOL, INT, INT32, RAW, TEXT, UINT, UINT32, ZIGZAG, Declared, Message, field, nested

PYCRIU = Path(__file__).resolve().parents[2] / ".cache/criu/pycriu"

NAMES: dict[type[Message], str] = {
    messages.InheritFd: "inherit_fd",
    messages.Options: "criu_opts",
    messages.Request: "criu_req",
    messages.RestoreAnswer: "criu_restore_resp",
    messages.Notification: "criu_notify",
    messages.Version: "criu_version",
    messages.Answer: "criu_resp",
    messages.PagemapHead: "pagemap_head",
    messages.PagemapEntry: "pagemap_entry",
    messages.PstreeEntry: "pstree_entry",
    messages.Credentials: "creds_entry",
    messages.Rseq: "rseq_entry",
    messages.ThreadCore: "thread_core_entry",
    messages.Rlimit: "rlimit_entry",
    messages.Rlimits: "task_rlimits_entry",
    messages.TaskCore: "task_core_entry",
    messages.NamespaceIds: "task_kobj_ids_entry",
    messages.Core: "core_entry",
    messages.Inventory: "inventory_entry",
    messages.Vma: "vma_entry",
    messages.Memory: "mm_entry",
    messages.RegularFile: "reg_file_entry",
    messages.InetSocket: "inet_sk_entry",
    messages.File: "file_entry",
    messages.Remap: "remap_file_path_entry",
    messages.GhostFile: "ghost_file_entry",
    messages.FdInfo: "fdinfo_entry",
    messages.SeccompFilter: "seccomp_filter",
    messages.Seccomp: "seccomp_entry",
    contents._UnixSocket: "unix_sk_entry",
    contents._AnyFile: "file_entry",
    contents._ObjectIds: "task_kobj_ids_entry",
}
"""CRIU's names of what is declared here."""

UINT64_TYPE, INT64_TYPE, INT32_TYPE, BOOL_TYPE, STRING, MESSAGE, BYTES, UINT32_TYPE, ENUM, SINT32, SINT64 = (
    *(4, 3, 5, 8, 9, 11, 12, 13, 14, 17, 18),
)
TYPES = {
    id(UINT): {UINT64_TYPE},
    id(UINT32): {UINT32_TYPE, ENUM},
    id(INT): {INT64_TYPE},
    id(INT32): {INT32_TYPE, ENUM},
    id(ZIGZAG): {SINT32, SINT64},
    id(BOOL): {BOOL_TYPE},
    id(TEXT): {STRING},
    id(RAW): {BYTES},
}
"""``FieldDescriptorProto.Type`` of each kind."""
OPTIONAL, REQUIRED, REPEATED = 1, 2, 3


@dataclass
class FieldDescriptor(Message):
    name: str | None = field(1, TEXT)
    number: int | None = field(3, INT32)
    label: int | None = field(4, INT32)
    type: int | None = field(5, INT32)
    type_name: str | None = field(6, TEXT)


@dataclass
class Descriptor(Message):
    name: str | None = field(1, TEXT)
    fields: list[FieldDescriptor] = nested(2, FieldDescriptor, repeated=True)


@dataclass
class FileDescriptor(Message):
    """``google/protobuf/descriptor.proto``: a protobuf message, too."""

    name: str | None = field(1, TEXT)
    messages: list[Descriptor] = nested(4, Descriptor, repeated=True)


@cache
def descriptors() -> dict[str, dict[int, FieldDescriptor]]:
    """Return {message: {number: field}} of all messages of CRIU."""
    if not PYCRIU.is_dir():
        pytest.skip(f"{PYCRIU} is missing: tools/setup-criu --descriptors fetches it")
    found: dict[str, dict[int, FieldDescriptor]] = {}
    for file in PYCRIU.rglob("*_pb2.py"):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "AddSerializedFile":
                for message in FileDescriptor.decode(ast.literal_eval(node.args[0])).messages:
                    found[message.name or ""] = {each.number or 0: each for each in message.fields}
    return found


def declared(schema: type[Message]) -> list[tuple[str, Declared]]:
    """Return the declared fields of a message with their names."""
    return list(schema.schema().values())


def wrong(schema: type[Message]) -> list[str]:
    """Return what is declared otherwise than CRIU has it."""
    theirs, found = descriptors()[NAMES[schema]], []
    for name, ours in declared(schema):
        other = theirs.get(ours.number)
        if other is None:
            found.append(f"{name}: CRIU has no field {ours.number}")
            continue
        label = REPEATED if ours.repeated else REQUIRED if ours.required else OPTIONAL
        if label != other.label:
            found.append(f"{name}: label {label}, not {other.label}")
        message = getattr(ours.kind.decode, "__self__", None)
        types = {MESSAGE} if message else TYPES[id(ours.kind)]
        if other.type not in types:
            found.append(f"{name}: types {types}, not {other.type} ({other.name})")
        if message and other.type_name != f".{NAMES[message]}":
            found.append(f"{name}: {NAMES[message]}, not {other.type_name}")
    return found


def all_messages(module: Any) -> set[type[Message]]:  # noqa: ANN401 - a module
    """Return the messages that a module declares."""
    return {
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Message) and value.__module__ == module.__name__
    }


@pytest.mark.parametrize("schema", NAMES, ids=lambda schema: schema.__name__.strip("_"))
def test_fields_are_as_criu_has_them(schema: type[Message]) -> None:
    """Number, type and label of every declared field are those of CRIU's descriptor."""
    assert wrong(schema) == []


def test_every_message_is_compared() -> None:
    """No message that is read or written is missing from the comparison."""
    assert all_messages(messages) | all_messages(contents) == set(NAMES)


def test_required_fields_are_the_ones_never_none() -> None:
    """A field whose annotation allows no None is required or repeated, and no other is."""
    for schema in NAMES:
        for name, each in declared(schema):
            annotation = next(own[name] for own in map(inspect.get_annotations, schema.__mro__) if name in own)
            assert ("None" in annotation) == (not each.required and not each.repeated), f"{schema.__name__}.{name}"


def test_pages_of_a_run() -> None:
    """The 64-bit field counts where it is set, the old one where it is not."""
    assert messages.PagemapEntry(vaddr=0, compat_nr_pages=3).pages == 3
    assert messages.PagemapEntry(vaddr=0, compat_nr_pages=3, nr_pages=1 << 33).pages == 1 << 33
    assert messages.PagemapEntry(vaddr=0).pages == 0
    assert isinstance(messages.PagemapEntry(vaddr=0), protobuf.Message)
