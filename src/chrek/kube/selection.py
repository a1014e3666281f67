"""Which pods are ChReK's, which container is meant, and which checkpoint.

Pure functions of what the API server and the container's PID 1 say. The variables are those PID 1 was
started with, never the application's own: a restored process carries the environment of where it was
captured.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from chrek.artifact.names import checkpoint_id
from chrek.errors import Reason, Refused
from chrek.kube import names
from chrek.kube.pods import Pod, PodContainer


class Wish(Enum):
    """What a pod asks for."""

    CAPTURE = "capture"
    """To be checkpointed."""
    RESTORE = "restore"
    """To be restored by the agent."""
    REPORT = "report"
    """It restores itself; the agent only reports how it started."""


@dataclass(frozen=True)
class Choice:
    """A container and the checkpoint it is about.

    Attributes:
        checkpoint_mode: the application waits for a signal file.
        location: the checkpoint's directory as the container sees it, where it was named.
    """

    container: str
    checkpoint_id: str
    checkpoint_mode: bool
    location: str | None


def wishes(pod: Pod) -> frozenset[Wish]:
    """Return what a pod asks for; empty: the pod is none of ours.

    A pod with both labels is restored first and captured again when it is ready.
    """
    found = set()
    if pod.labels.get(names.SOURCE_LABEL) == "true":
        found.add(Wish.CAPTURE)
    if pod.labels.get(names.RESTORE_LABEL) == "true":
        found.add(Wish.RESTORE)
    if not found and any(names.HASH_VARIABLE in each.variables for each in pod.containers):
        found.add(Wish.REPORT)
    return frozenset(found)


def container(pod: Pod) -> PodContainer:
    """Return the container that is meant.

    The annotation of ours decides, else kubectl's, else the name ``main``, else being the only one. Native
    sidecars do not count, unless ours names one.

    Raises:
        Refused: CONTAINER_UNCLEAR.
    """
    for annotation in (names.CONTAINER_ANNOTATION, names.DEFAULT_CONTAINER_ANNOTATION):
        name = pod.annotations.get(annotation)
        if name is None:
            continue
        found = pod.container(name)
        if found is None:
            raise Refused(
                Reason.CONTAINER_UNCLEAR, f"Pod {pod} has no container {name}, which its annotation {annotation} names."
            )
        return found
    ordinary = [each for each in pod.containers if not each.sidecar]
    main = next((each for each in ordinary if each.name == "main"), None)
    if main is not None:
        return main
    if len(ordinary) == 1:
        return ordinary[0]
    listed = ", ".join(each.name for each in ordinary)
    raise Refused(Reason.CONTAINER_UNCLEAR, f"Pod {pod} has several containers and none is named main: {listed}.")


def for_capture(pod: Pod, environment: Mapping[str, str]) -> Choice:
    """Return what to capture and under which id.

    In checkpoint mode the id is the label's, else the variable's, else the last element of the location,
    and those that are there must agree. Otherwise the variables say what the container was *restored from*,
    so the label alone says what to write.

    Args:
        pod: the pod.
        environment: of the container's PID 1.

    Raises:
        Refused: CONTAINER_UNCLEAR, NO_READINESS_PROBE or ID_MISMATCH.
        UsageError: BAD_ID; no id at all is one too.
    """
    chosen = container(pod)
    if not chosen.readiness_probe:
        raise Refused(Reason.NO_READINESS_PROBE, f"Container {chosen.name} of pod {pod} has no readiness probe.")
    mode = bool(environment.get(names.SIGNAL_VARIABLE))
    location = environment.get(names.LOCATION_VARIABLE) or None
    sources = {f"label {names.HASH_LABEL}": pod.labels.get(names.HASH_LABEL)}
    if mode:
        sources[names.HASH_VARIABLE] = environment.get(names.HASH_VARIABLE)
        sources[names.LOCATION_VARIABLE] = posixpath.basename(location.rstrip("/")) if location else None
    return Choice(chosen.name, _agreed(pod, sources), mode, location)


def for_restore(pod: Pod, environment: Mapping[str, str]) -> Choice:
    """Return what to restore into which container; the label, where there is one, must agree.

    Raises:
        Refused: CONTAINER_UNCLEAR or ID_MISMATCH.
        UsageError: BAD_ID; no id at all is one too.
    """
    sources = {
        f"label {names.HASH_LABEL}": None if Wish.CAPTURE in wishes(pod) else pod.labels.get(names.HASH_LABEL),
        names.HASH_VARIABLE: environment.get(names.HASH_VARIABLE),
    }
    return Choice(container(pod).name, _agreed(pod, sources), checkpoint_mode=False, location=None)


def named(pod: Pod) -> frozenset[str | None]:
    """Return the checkpoint ids that a pod names, anywhere; None among them stands for one that only its node knows.

    That is an id which comes from a ConfigMap, a Secret or a field, where no label says it.
    """
    found: set[str | None] = {pod.labels.get(names.HASH_LABEL) or ""}
    for each in pod.containers:
        found.add(each.variables.get(names.HASH_VARIABLE, ""))
        location = each.variables.get(names.LOCATION_VARIABLE, "")
        found.add(None if location is None else posixpath.basename(location.rstrip("/")))
    found.discard("")
    return frozenset(found - {None} if pod.labels.get(names.HASH_LABEL) else found)


def _agreed(pod: Pod, sources: Mapping[str, str | None]) -> str:
    given = {source: value for source, value in sources.items() if value}
    if len(set(given.values())) > 1:
        differing = ", ".join(f"{source} says {value!r}" for source, value in given.items())
        raise Refused(Reason.ID_MISMATCH, f"Pod {pod} names different checkpoints: {differing}.")
    return checkpoint_id(next(iter(given.values()), ""))
