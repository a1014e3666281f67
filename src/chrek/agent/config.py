"""What the agent is told: one JSON file, written by the chart, and the pod's own place from the environment."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from chrek.errors import Reason, UsageError

_CHOICES = {
    "scope": ("namespace", "cluster"),
    "verify": ("full", "sampled", "off"),
    "log_format": ("json", "text"),
    "log_level": ("debug", "info", "warning", "error"),
}


@dataclass(frozen=True)
class Signals:
    """The node's folder of signal files: as pods mount it, and where the agent sees it (empty: nowhere)."""

    host_path: str = "/var/lib/chrek/signals"
    mounted_at: str = ""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that can be set; times in seconds.

    Attributes:
        node, namespace: where this agent runs.
        scope: ``namespace``: only the pods of its own; ``cluster``: all, each namespace with a store of its own.
        share_with: checkpoints of a namespace (key) may be restored into these others.
        signals: where signal files go when a container cannot take its own.
        captures_per_node, captures_per_gpu: how many at a time.
        deadline_seconds: for one capture.
        retries: how often a failed capture is tried again.
        runtime_socket: the runtime's socket; empty: the usual places below `host_root`.
    """

    node: str
    namespace: str
    scope: str = "namespace"
    share_with: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    store: str = "/checkpoints"
    signals: Signals = Signals()
    captures_per_node: int = 2
    captures_per_gpu: int = 1
    deadline_seconds: int = 900
    retries: int = 0
    verify: str = "full"
    runtime_socket: str = ""
    host_root: str = "/"
    log_format: str = "json"
    log_level: str = "info"
    port: int = 9402
    tracing_endpoint: str = ""

    def store_of(self, namespace: str) -> str:
        """Return the directory of the checkpoints of a namespace."""
        return f"{self.store.rstrip('/')}/namespaces/{namespace}" if self.scope == "cluster" else self.store

    def may_use(self, *, owner: str | None, user: str) -> bool:
        """Whether a checkpoint taken in *owner* may be restored in *user*."""
        return owner == user or user in self.share_with.get(owner or "", ())


def load(path: Path | None, *, node: str | None, namespace: str | None) -> Config:
    """Read the file; without one everything has its default.

    Raises:
        UsageError: BAD_VALUE, naming what is wrong.
    """
    for variable, place in (("NODE_NAME", node), ("POD_NAMESPACE", namespace)):
        if not place:
            message = f"The agent does not know its {variable}."
            raise UsageError(Reason.BAD_VALUE, message, cure="Set it in the environment.")
    given = {} if path is None else _read(path)
    known = {each.name: each for each in fields(Config)}
    values: dict[str, Any] = {"node": node, "namespace": namespace}
    for name, value in given.items():
        if name not in known or name in values:
            raise _wrong(path, name, value, "a name that is not known")
        values[name] = _value(path, name, value)
    return Config(**values)


def _read(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(Reason.BAD_VALUE, f"The agent's configuration {path} cannot be read: {error}.") from error
    if not isinstance(found, dict):
        raise UsageError(Reason.BAD_VALUE, f"The agent's configuration {path} is not a JSON object.")
    return found


def _value(path: Path | None, name: str, value: object) -> object:
    if name == "signals":
        if not isinstance(value, dict) or not all(isinstance(each, str) for each in value.values()):
            raise _wrong(path, name, value, "not an object of texts")
        return Signals(**value)
    if name == "share_with":
        if not isinstance(value, dict) or not all(isinstance(each, list) for each in value.values()):
            raise _wrong(path, name, value, "not lists of namespaces")
        return {owner: tuple(map(str, users)) for owner, users in value.items()}
    default = next(each.default for each in fields(Config) if each.name == name)
    expected = int if isinstance(default, int) else str
    if not isinstance(value, expected) or isinstance(value, bool):
        raise _wrong(path, name, value, f"not a value of type {expected.__name__}")
    if name in _CHOICES and value not in _CHOICES[name]:
        raise _wrong(path, name, value, f"not one of {', '.join(_CHOICES[name])}")
    if isinstance(value, int) and value < (0 if name == "retries" else 1):
        raise _wrong(path, name, value, "too small")
    return value


def _wrong(path: Path | None, name: str, value: object, what: str) -> UsageError:
    return UsageError(Reason.BAD_VALUE, f"{path}: {name} is {value!r}: {what}.", cure="See the chart's values.yaml.")
