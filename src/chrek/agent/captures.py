"""Captures: which pod is to be checkpointed now, and what everybody is told of it.

`look` is called again and again with the newest state of a pod, and always comes to the same result: whether there
was a capture of this container already is read from the pod's annotation, from the store (the marker names the
container) and from the signal file in the container, never from memory. So an agent that starts again
repeats nothing, and finishes what its predecessor had not said yet.

Every end says the same thing in four places, in this order: the signal file (the application waits for it), the
event (people), the annotation (this agent's successor), the metric.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from chrek.agent import inside, log, unsaid, work
from chrek.agent.node import Node, allowed, require_supported
from chrek.agent.slots import Slots, gpus_of
from chrek.artifact import FORMAT_VERSION
from chrek.engine import gpu, signalfile
from chrek.engine.container import Container
from chrek.errors import CaptureFailed, ChrekError, Reason, Refused, UsageError
from chrek.kube import ApiFailed, CheckpointLease, EventReason, names, selection
from chrek.store import Store, failures, identity, open_checkpoint
from chrek.store.locks import is_locked
from chrek.system import initstate, procfs

if TYPE_CHECKING:
    from chrek.agent.tracing import Span
    from chrek.artifact import Checkpoint, Manifest, Marker
    from chrek.kube import Pod, PodContainer
    from chrek.kube.selection import Choice
    from chrek.runtime.container import Container as RuntimeContainer
    from chrek.system.ids import HostPid

SOON: Final = 0.5
LATER: Final = 2.0
SHUTDOWN: Final = "the agent ends"
_UNUSABLE: Final = frozenset({Reason.CORRUPT, Reason.FORMAT_TOO_NEW})
_POD_UID, _CONTAINER_ID = "pod_uid", unsaid.CONTAINER_KEY


@dataclass(frozen=True)
class _Case:
    """One container that asks for a checkpoint."""

    pod: Pod
    runtime: RuntimeContainer
    container: Container
    choice: Choice
    store: str

    @property
    def context(self) -> dict[str, object]:
        """What log lines say of it."""
        return {"pod": str(self.pod), "id": self.choice.checkpoint_id, "container": self.runtime.id[:12]}

    @property
    def extra(self) -> dict[str, object]:
        """What marker and signal file say of it."""
        return {_POD_UID: self.pod.uid, _CONTAINER_ID: self.runtime.id}

    @property
    def location(self) -> str:
        """The checkpoint as the container calls it, else as the agent does."""
        return self.choice.location or f"{self.store}/{self.choice.checkpoint_id}"


class Captures:
    """The captures of one node."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.slots = Slots(node=node.config.captures_per_node, gpu=node.config.captures_per_gpu)
        self._lock = threading.Lock()
        self._stops: dict[str, work.Stop] = {}
        # Only so that the API server's word of what was just written need not be waited for.
        self._concluded: set[str] = set()
        self._attempts: dict[str, int] = {}

    def stop(self, why: str, uid: str | None = None) -> None:
        """Undo the capture of a pod, or all."""
        with self._lock:
            for each in [stop for key, stop in self._stops.items() if uid in (None, key)]:
                each.ask(why)

    def forget(self, pod: Pod) -> None:
        """Undo and forget what concerns a pod that is gone or going."""
        self.stop("the pod is being deleted", pod.uid)
        self.slots.forget(pod.uid)
        for each in pod.containers:
            self._attempts.pop(plain_id(each.id), None)
            self._concluded.discard(plain_id(each.id))

    def look(self, pod: Pod, chosen: PodContainer) -> float | None:
        """Do what is due for a pod; return in how many seconds to look again, None: when it changes.

        Raises:
            ApiFailed: the API server did not take what had to be said; look again.
            ChrekError: RUNTIME_UNREACHABLE.
        """
        if not chosen.running or _concluded(pod, chosen) or plain_id(chosen.id) in self._concluded:
            return None
        try:
            runtime = self._node.runtime.container(chosen.id)
        except Refused:
            return None
        container = Container(runtime.pid)
        try:
            require_supported(pod)
            choice = selection.for_capture(pod, runtime.environment)
            case = _Case(pod, runtime, container, choice, self._node.config.store_of(pod.namespace))
            allow = allowed(pod)
            inside.check_store(container, choice.location, self._node.config.store)
        except (Refused, UsageError) as error:
            self._refuse_early(pod, runtime, container, error)
            return None
        if not _is_ready(case):
            return SOON if pod.ready else None
        try:
            return self._decide(case, allow, chosen)
        except ApiFailed:
            raise
        except ChrekError as error:
            self._failed(case, error)
            return None

    def look_back(self, pod: Pod, chosen: PodContainer) -> None:
        """Say of a container that has ended what a predecessor had not said any more.

        Raises:
            ApiFailed: as `look`.
        """
        container = plain_id(chosen.id)
        if not container or _concluded(pod, chosen) or container in self._concluded:
            return
        verdict = unsaid.from_ended(pod, chosen, container, self._node.config.store_of(pod.namespace))
        if verdict is not None:
            self._tell(pod, container, verdict)

    # --- decisions --------------------------------------------------------------------------------------------

    def _decide(self, case: _Case, allow: frozenset[Reason], chosen: PodContainer) -> float | None:
        verdict = unsaid.from_signal(inside.read_signal(case.container), case.runtime.id)
        if verdict is not None:
            # Our predecessor wrote it and ended before it could say so elsewhere.
            self._tell(case.pod, case.runtime.id, verdict)
            return None
        if self._exists(case):
            return None
        with self.slots.take(
            f"{case.store}\0{case.choice.checkpoint_id}", gpus_of(case.runtime.spec), who=case.pod.uid
        ) as free:
            return self._capture(case, allow, chosen) if free else SOON

    def _exists(self, case: _Case) -> bool:
        """Deal with a checkpoint of this id that is there already; whether nothing is left to do.

        Raises:
            Refused: it is of something else, or unusable, and may not be replaced.
        """
        replaceable = case.pod.annotations.get(names.REPLACE_ANNOTATION) == "true"
        try:
            with Store.open(case.store) as store, open_checkpoint(store, case.choice.checkpoint_id) as found:
                if found.marker.extra.get(_CONTAINER_ID) == case.runtime.id:
                    self._created(case, found.manifest)
                    return True
                differing = _differences(case, found.manifest)
                if not differing:
                    self._skipped(case, found)
                    return True
        except Refused as error:
            if error.reason is Reason.NOT_FOUND or (replaceable and error.reason in _UNUSABLE):
                return False
            raise
        if replaceable:
            return False
        message = f"Checkpoint {case.choice.checkpoint_id} exists and is of something else: {'; '.join(differing)}."
        cure = f'Use another id, delete the old one, or annotate the pod with {names.REPLACE_ANNOTATION}: "true".'
        raise Refused(Reason.ID_IN_USE_DIFFERENT, message, cure=cure)

    def _capture(self, case: _Case, allow: frozenset[Reason], chosen: PodContainer) -> float | None:
        """Capture under the id's lease; say how it went."""
        stop = work.Stop()
        with self._lock:
            self._stops[case.pod.uid] = stop
        self._node.metrics.under_way("checkpoint", 1)
        try:
            with self._lease(case) as lease, self._node.tracer.span("capture", case.context) as span:
                # Whoever had the lease until now may have made it; and an agent beside us shares it.
                seen = _seen(case)
                if self._exists(case):
                    return None
                self._announce(case)
                outcome = work.run(
                    self._request(case, allow, chosen, seen),
                    stop=stop,
                    on_phase=lambda phase: self._phase(case, phase, lease, stop, span),
                )
        except CaptureFailed as error:
            if self._was_made(case):
                return None
            if stop.asked == SHUTDOWN:
                log.info("capture undone; the next agent begins anew", **case.context)
                return None
            again = self._retry(case)
            if again is None:
                self._failed(case, error)
            return again
        except Refused as error:
            if self._was_made(case):
                return None
            # What another agent of this node holds still looks in many ways like what cannot be captured.
            if error.reason is not Reason.CAPTURE_IN_PROGRESS and not _is_being_written(case):
                raise
            log.info(error.message, **case.context)
            return LATER
        finally:
            self._node.metrics.under_way("checkpoint", -1)
            with self._lock:
                self._stops.pop(case.pod.uid, None)
        for warning in outcome["warnings"]:
            log.warning(warning, **case.context)
        self._node.metrics.measured(
            "checkpoint", seconds=outcome["seconds"], size=outcome["bytes"], phases=outcome["phases"]
        )
        self._node.metrics.frozen(outcome["frozen_seconds"])
        with Store.open(case.store) as store, open_checkpoint(store, case.choice.checkpoint_id) as made:
            self._created(case, made.manifest)
        return None

    def _lease(self, case: _Case) -> CheckpointLease:
        config = self._node.config
        wide = config.scope == "cluster"
        name = f"{case.pod.namespace}/{case.choice.checkpoint_id}" if wide else case.choice.checkpoint_id
        return CheckpointLease(
            self._node.api,
            namespace=config.namespace,
            checkpoint_id=name,
            holder=config.node,
            on_trouble=lambda error: self._node.trouble(error, **case.context),
        )

    def _was_made(self, case: _Case) -> bool:
        """Whether another agent of this node has captured this container meanwhile; then it is told of once more."""
        with suppress(ChrekError), Store.open(case.store) as store, open_checkpoint(store, case.choice.checkpoint_id) as found:
            if found.marker.extra.get(_CONTAINER_ID) == case.runtime.id:
                self._created(case, found.manifest)
                return True
        return False

    def _request(
        self, case: _Case, allow: frozenset[Reason], chosen: PodContainer, instead_of: str
    ) -> dict[str, object]:
        return {
            "verb": "capture",
            "format": format_for(case.runtime.pid),
            "pid1": case.runtime.pid,
            "store": case.store,
            "id": case.choice.checkpoint_id,
            "location": case.choice.location,
            "deadline": self._node.config.deadline_seconds,
            "allow": [reason.code for reason in allow],
            "liveness": chosen.liveness_seconds,
            "image": image_of(case.runtime),
            "namespace": case.pod.namespace,
            "service_account": case.pod.service_account,
            "extra": case.extra,
            "instead_of": instead_of,
        }

    def _phase(self, case: _Case, phase: str, lease: CheckpointLease, stop: work.Stop, span: Span) -> None:
        span.phase(phase)
        log.info(f"capture: {phase}", phase=phase, **case.context)
        try:
            lease.check()
        except CaptureFailed as error:
            stop.ask(error.message)

    def _retry(self, case: _Case) -> float | None:
        """Return when to try again, None when it was tried often enough."""
        tried = self._attempts[case.runtime.id] = self._attempts.get(case.runtime.id, 0) + 1
        return LATER if tried <= self._node.config.retries else None

    # --- what everybody is told -------------------------------------------------------------------------------

    def _announce(self, case: _Case) -> None:
        log.info("capture begins", **case.context)
        with suppress(ApiFailed):
            message = f"Checkpoint {case.choice.checkpoint_id} of container {case.choice.container} begins."
            self._node.tell(case.pod, EventReason.CHECKPOINT_STARTED, message, case.runtime.id)

    def _created(self, case: _Case, manifest: Manifest) -> None:
        self._signal(case, None)
        with suppress(ChrekError), Store.open(case.store) as store:
            failures.forget(store, case.choice.checkpoint_id)
        self._tell(case.pod, case.runtime.id, unsaid.created(case.choice.checkpoint_id, manifest))

    def _skipped(self, case: _Case, found: Checkpoint) -> None:
        message = (
            f"Checkpoint {case.choice.checkpoint_id} exists, of the same application, since {found.manifest.created}."
        )
        self._signal(case, None)
        self._tell(case.pod, case.runtime.id, unsaid.Verdict(EventReason.CHECKPOINT_SKIPPED, message, "skipped"))

    def _failed(self, case: _Case, error: ChrekError) -> None:
        refused = isinstance(error, Refused | UsageError)
        self._signal(case, error)
        log.warning(str(error), reason=error.reason.code, **case.context)
        kind = EventReason.CHECKPOINT_REFUSED if refused else EventReason.CHECKPOINT_FAILED
        self._node.tell(case.pod, kind, error, case.runtime.id)
        self._note(case.pod, case.runtime.id, f"{'refused' if refused else 'failed'}/{error.reason.code}")
        self._node.metrics.ended("checkpoint", "refused" if refused else "failed", error.reason.code)

    def _refuse_early(self, pod: Pod, runtime: RuntimeContainer, container: Container, error: ChrekError) -> None:
        """Say that there will be no capture, before it is even known which checkpoint was meant."""
        named = runtime.environment.get(names.HASH_VARIABLE) or pod.labels.get(names.HASH_LABEL) or "unknown"
        try:
            marker = signalfile.marker(named, path="", error=error)
        except ValueError:
            marker = signalfile.marker("unknown", path="", error=error)
        choice = selection.Choice(runtime.name, marker.checkpoint_id, checkpoint_mode=True, location=None)
        self._failed(_Case(pod, runtime, container, choice, self._node.config.store_of(pod.namespace)), error)

    def _signal(self, case: _Case, error: ChrekError | None) -> None:
        """Write the signal file; an application that cannot be told is one more thing to be said."""
        marker = signalfile.marker(case.choice.checkpoint_id, path=case.location, error=error, extra=case.extra)
        if error is not None:
            _leave_word(case, marker)
        try:
            inside.write_signal(case.container, marker, signals=self._node.config.signals, runtime=case.runtime)
        except ChrekError as failure:
            log.warning(str(failure), reason=failure.reason.code, **case.context)
            if failure.reason is Reason.APP_NOT_FOUND:
                return  # it has ended meanwhile: nobody is left who waits
            with suppress(ApiFailed):
                self._node.tell(case.pod, EventReason.CHECKPOINT_FAILED, failure, case.runtime.id)

    def _tell(self, pod: Pod, container: str, verdict: unsaid.Verdict) -> None:
        """Say what came of a capture: log, event, annotation, metric."""
        log.info(verdict.message, pod=str(pod), container=container[:12], reason=verdict.reason)
        self._node.tell(pod, verdict.kind, verdict.message, container)
        self._note(pod, container, verdict.result)
        self._node.metrics.ended("checkpoint", verdict.outcome, verdict.reason)

    def _note(self, pod: Pod, container: str, result: str) -> None:
        self._node.annotate(pod, {names.RESULT_ANNOTATION: f"{result} container={container[:12]}"})
        self._concluded.add(container)


def _concluded(pod: Pod, chosen: PodContainer) -> bool:
    """Whether the annotation says what came of this very container."""
    _, separator, container = pod.annotations.get(names.RESULT_ANNOTATION, "").rpartition(" container=")
    return bool(separator) and plain_id(chosen.id).startswith(container)


def plain_id(container_id: str) -> str:
    """Return a container's id without the runtime's name before it."""
    return container_id.rpartition("://")[2]


def _is_ready(case: _Case) -> bool:
    if not case.pod.ready:
        return False
    if not case.choice.checkpoint_mode:
        return True
    path = case.runtime.environment.get(names.READY_VARIABLE)
    return not path or inside.is_file(case.container, path)


def _leave_word(case: _Case, failure: Marker) -> None:
    """End the wait of those who wait for this checkpoint; a store that takes no word of it costs only their patience."""
    try:
        with Store.open(case.store, create=True) as store:
            failures.note(store, failure)
    except (ChrekError, OSError) as error:
        log.debug(str(error), **case.context)


def _seen(case: _Case) -> str:
    """Return which checkpoint of this id there is now."""
    with Store.open(case.store, create=True) as store:
        return identity(store, case.choice.checkpoint_id)


def _is_being_written(case: _Case) -> bool:
    """Whether some process of this node is writing the checkpoint just now."""
    try:
        with Store.open(case.store) as store:
            return is_locked(store, case.choice.checkpoint_id)
    except (ChrekError, OSError):
        return False


def format_for(pid1: HostPid) -> int:
    """Return the newest format that both this agent and the container's own bundle know."""
    try:
        return min(FORMAT_VERSION, initstate.read_state(pid1).reads_format)
    except Refused:
        return FORMAT_VERSION  # no init of ours: the capture refuses it, and knows why


def image_of(runtime: RuntimeContainer) -> str:
    """Return what says most about a container's image."""
    return runtime.image_digest or runtime.image_ref or runtime.image


def _differences(case: _Case, manifest: Manifest) -> list[str]:
    command = procfs.command_line(initstate.application(case.runtime.pid))
    there = manifest.provenance
    pairs = (
        ("its command", there.command, command),
        ("its image", there.image, image_of(case.runtime)),
        ("its format", manifest.format_version, format_for(case.runtime.pid)),
    )
    found = [f"{what} is {old}, this pod's {new}" for what, old, new in pairs if old is not None and old != new]
    return [*found, *gpu.differing(manifest, case.container)]
