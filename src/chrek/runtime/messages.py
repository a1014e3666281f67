"""The CRI messages that are used, each with just the fields it needs.

Field numbers: ``runtime/v1/api.proto`` of Kubernetes 1.36. The interface is versioned; fields are only added.
"""

# ruff: noqa: RUF009 - `nested` only describes a field

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from chrek.system.protobuf import BOOL, INT, TEXT, UINT, Message, field, nested

SERVICE = "/runtime.v1.RuntimeService"


class State(IntEnum):
    """``ContainerState``; CREATED, being 0, is not sent."""

    CREATED = 0
    RUNNING = 1
    EXITED = 2
    UNKNOWN = 3


@dataclass
class Pair(Message):
    """One entry of a ``map<string, string>``."""

    key: str | None = field(1, TEXT)
    value: str | None = field(2, TEXT)


def mapping(pairs: list[Pair]) -> dict[str, str]:
    """Turn a map's entries into a dictionary; empty keys and values are not sent."""
    return {pair.key or "": pair.value or "" for pair in pairs}


@dataclass
class VersionRequest(Message):
    """What the caller would like to speak; runtimes ignore it."""

    version: str | None = field(1, TEXT)


@dataclass
class VersionResponse(Message):
    """Who answers."""

    runtime_name: str | None = field(2, TEXT)
    runtime_version: str | None = field(3, TEXT)
    runtime_api_version: str | None = field(4, TEXT)


@dataclass
class Metadata(Message):
    """A container's name in its pod, and which start of it this is."""

    name: str | None = field(1, TEXT)
    attempt: int | None = field(2, UINT)


@dataclass
class ImageSpec(Message):
    """An image as the pod names it."""

    image: str | None = field(1, TEXT)


@dataclass
class StateValue(Message):
    """A state to filter by."""

    state: int | None = field(1, UINT)


@dataclass
class Filter(Message):
    """Which containers to list; all conditions hold."""

    id: str | None = field(1, TEXT)
    state: StateValue | None = nested(2, StateValue)
    labels: list[Pair] = nested(4, Pair, repeated=True)


@dataclass
class ListRequest(Message):
    """``ListContainersRequest``."""

    filter: Filter | None = nested(1, Filter)


@dataclass
class Listed(Message):
    """``Container``: a line of a listing."""

    id: str | None = field(1, TEXT)
    metadata: Metadata | None = nested(3, Metadata)
    state: int | None = field(6, UINT)
    labels: list[Pair] = nested(8, Pair, repeated=True)


@dataclass
class ListResponse(Message):
    """``ListContainersResponse``."""

    containers: list[Listed] = nested(1, Listed, repeated=True)


@dataclass
class StatusRequest(Message):
    """``ContainerStatusRequest``; verbose adds `info`, where the process id and the spec are."""

    container_id: str | None = field(1, TEXT)
    verbose: bool | None = field(2, BOOL)


@dataclass
class Mount(Message):
    """A volume of the container."""

    container_path: str | None = field(1, TEXT)
    host_path: str | None = field(2, TEXT)
    readonly: bool | None = field(3, BOOL)


@dataclass
class Status(Message):
    """``ContainerStatus``."""

    id: str | None = field(1, TEXT)
    metadata: Metadata | None = nested(2, Metadata)
    state: int | None = field(3, UINT)
    started_at: int | None = field(5, INT)
    image: ImageSpec | None = nested(8, ImageSpec)
    image_ref: str | None = field(9, TEXT)
    labels: list[Pair] = nested(12, Pair, repeated=True)
    mounts: list[Mount] = nested(14, Mount, repeated=True)
    log_path: str | None = field(15, TEXT)


@dataclass
class StatusResponse(Message):
    """``ContainerStatusResponse``."""

    status: Status | None = nested(1, Status)
    info: list[Pair] = nested(2, Pair, repeated=True)
