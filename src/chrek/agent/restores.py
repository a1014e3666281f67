"""Restores: containers whose init waits for one, and how every container of ours started.

What a container's init has published decides; it is looked at until the application runs. Of a pod with the
restore label the agent claims the restore as soon as the init waits. Of any other pod that names a checkpoint
it only reports how it started, so that no cold start stays a secret.

Pods are looked at from the moment they are bound to the node: between a container's start and the API's word of
it lies the kubelet's own second.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from chrek.agent import log, work
from chrek.agent.captures import image_of
from chrek.agent.node import NEVER_ALLOWED_RESTORING, Node, allowed, require_supported
from chrek.errors import ChrekError, ExitCode, Reason, Refused, UsageError
from chrek.kube import ApiFailed, EventReason, names, selection
from chrek.kube.selection import Wish
from chrek.store import Store, failures, open_checkpoint
from chrek.system import initstate

if TYPE_CHECKING:
    from chrek.artifact import Provenance
    from chrek.kube import Pod, PodContainer
    from chrek.runtime.container import Container as RuntimeContainer

SOON: Final = 0.1
LATER: Final = 1.0
SLOWLY: Final = 5.0
YOUNG: Final = 15.0
"""Seconds after a container's start until what is not our init counts as something else."""
DEADLINE: Final = 600
"""Seconds for one restore."""
SHORT_LIVES: Final = 3
"""Restored starts in a row that may end within a minute."""


@dataclass(frozen=True)
class _Start:
    """How a container came to run: ``restored`` or ``cold``, why, and how many seconds after its own start."""

    mode: str
    reason: str
    seconds: float
    checkpoint_id: str

    @property
    def how(self) -> str:
        return "restored" if self.mode == "restored" else f"cold/{self.reason or 'NONE'}"

    @property
    def value(self) -> str:
        """The annotation's value."""
        return f"{self.how} seconds={self.seconds:.3f}"

    @property
    def failed(self) -> bool:
        """Whether a restore was meant and did not work out."""
        return self.reason in Reason.__members__ and self.reason != Reason.NOT_FOUND.code

    def restored_words(self, container: str) -> str:
        return f"Container {container} runs from checkpoint {self.checkpoint_id}, {self.seconds:.2f} s after its start."

    def cold_words(self, container: str) -> str:
        why = f": {self.reason}" if self.reason else ""
        return f"Container {container} started cold{why}, not from checkpoint {self.checkpoint_id}."


class Restores:
    """The restores and starts of one node."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._lock = threading.Lock()
        # Only to save work and double counts within one life: the truth is in the annotation.
        self._reported: set[str] = set()
        self._told: set[str] = set()
        self._streaks: dict[str, int] = {}

    def forget(self, pod: Pod) -> None:
        """Forget what concerns a pod that is gone."""
        with self._lock:
            for each in pod.containers:
                key = each.id.rpartition("://")[2]
                self._reported.discard(key)
                self._told.discard(key)
                self._streaks.pop(key, None)

    def look(self, pod: Pod, chosen: PodContainer, wish: Wish) -> float | None:
        """Do what is due for a pod; return in how many seconds to look again, None: when it changes.

        Raises:
            ApiFailed: the API server did not take what had to be said; look again.
            ChrekError: RUNTIME_UNREACHABLE.
        """
        try:
            runtime = self._node.runtime.container_of(pod_uid=pod.uid, name=chosen.name)
        except Refused:
            return LATER / 4 if wish is Wish.RESTORE and pod.phase == "Pending" else None
        if names.SIGNAL_VARIABLE in runtime.environment:
            return None  # to be checkpointed, never restored
        try:
            state = initstate.read_state(runtime.pid)
        except Refused as error:
            return self._no_init(pod, runtime, wish, error)
        match state.mode:
            case "waiting" if wish is Wish.RESTORE:
                return self._restore(pod, chosen, runtime)
            case "restored" | "cold":
                how = _Start(state.mode, state.reason, state.seconds or 0.0, state.checkpoint_id)
                self._report(pod, runtime, how)
                return None
            case "waiting":
                return LATER
        return SOON

    # --- restoring --------------------------------------------------------------------------------------------

    def _restore(self, pod: Pod, chosen: PodContainer, runtime: RuntimeContainer) -> float | None:
        context: dict[str, object] = {"pod": str(pod), "container": runtime.id[:12]}
        refusal: ChrekError | None = None
        checkpoint_id, path, allow = "", self._node.config.store_of(pod.namespace), frozenset[Reason]()
        try:
            require_supported(pod)
            checkpoint_id = selection.for_restore(pod, runtime.environment).checkpoint_id
            context["id"] = checkpoint_id
            allow = allowed(pod, never=NEVER_ALLOWED_RESTORING) | _allowed_by_environment(runtime)
            self._check_streak(pod, chosen, runtime)
            path = self._find(pod, runtime, checkpoint_id, allow)
        except ChrekError as error:
            if isinstance(error, ApiFailed):
                raise
            refusal = error
            if error.reason is Reason.NOT_FOUND and _waits(runtime):
                refusal = _failure_of_the_capture(path, checkpoint_id, runtime)
                if refusal is None:
                    return LATER
        request = {
            "verb": "restore",
            "pid1": runtime.pid,
            "by": f"the agent of node {self._node.config.node}",
            "store": path,
            "id": checkpoint_id,
            "verify": runtime.environment.get("CHREK_VERIFY", self._node.config.verify).lower(),
            "deadline": DEADLINE,
            "allow": [reason.code for reason in allow],
            "refuse": [refusal.reason.code, refusal.message] if refusal else None,
        }
        return self._run(pod, runtime, request, context)

    def _run(
        self, pod: Pod, runtime: RuntimeContainer, request: dict[str, object], context: dict[str, object]
    ) -> float | None:
        log.info("restore begins", **context)
        metrics = self._node.metrics
        metrics.under_way("restore", 1)
        try:
            with self._node.tracer.span("restore", context) as span:

                def on_phase(phase: str) -> None:
                    span.phase(phase)
                    log.info(f"restore: {phase}", phase=phase, **context)

                outcome = work.run(request, stop=work.Stop(), on_phase=on_phase)
        except ChrekError as error:
            if error.reason is Reason.CLAIM_LOST:
                log.info(error.message, **context)
                return SOON
            self._failed(pod, runtime, error, context)
            return SOON
        finally:
            metrics.under_way("restore", -1)
        for warning in outcome["warnings"]:
            log.warning(warning, **context)
        log.info(f"restored in {outcome['seconds']:.2f} s", seconds=outcome["seconds"], **context)
        metrics.ended("restore", "restored")
        metrics.measured("restore", seconds=outcome["seconds"], size=outcome["bytes"], phases=outcome["phases"])
        # At once: an application that ends in the next moment was restored all the same.
        since = time.time() - runtime.started_at / 1e9
        with suppress(Refused):
            state = initstate.read_state(runtime.pid)
            since = state.seconds if state.mode == "restored" and state.seconds is not None else since
        self._report(pod, runtime, _Start("restored", "", since, str(request["id"])))
        return None

    def _failed(self, pod: Pod, runtime: RuntimeContainer, error: ChrekError, context: dict[str, object]) -> None:
        log.warning(str(error), reason=error.reason.code, **context)
        refused = isinstance(error, Refused | UsageError)
        self._node.metrics.ended("restore", "refused" if refused else "failed", error.reason.code)
        kind = EventReason.RESTORE_REFUSED if refused else EventReason.RESTORE_FAILED
        if error.reason is Reason.RESTORE_GIVEN_UP:
            kind = EventReason.RESTORE_GIVEN_UP
        self._told.add(runtime.id)
        if error.reason is not Reason.NOT_FOUND:
            with suppress(ApiFailed):
                self._node.tell(pod, kind, error, runtime.id)

    def _find(self, pod: Pod, runtime: RuntimeContainer, checkpoint_id: str, allow: frozenset[Reason]) -> str:
        """Return the store that has the checkpoint; look at whose it is, and of which image. The rest is the engine's.

        Raises:
            Refused: NOT_FOUND, TENANT_MISMATCH, IMAGE_MISMATCH, or what makes it unreadable.
        """
        config = self._node.config
        path, there = self._look_up(pod.namespace, checkpoint_id)
        if not config.may_use(owner=there.namespace, user=pod.namespace):
            owner = there.namespace or "none"
            message = f"Checkpoint {checkpoint_id} was taken in namespace {owner}, this pod is in {pod.namespace}."
            raise Refused(Reason.TENANT_MISMATCH, message)
        here = image_of(runtime)
        known = bool(there.image) and (there.image or "").startswith("sha256:") and here.startswith("sha256:")
        if known and there.image != here and Reason.IMAGE_MISMATCH not in allow:
            message = f"Checkpoint {checkpoint_id} was taken of image {there.image}; this container's is {here}."
            raise Refused(Reason.IMAGE_MISMATCH, message)
        return path

    def _look_up(self, namespace: str, checkpoint_id: str) -> tuple[str, Provenance]:
        """Return where a checkpoint is: the namespace's own first, then those that others share with it."""
        config = self._node.config
        absent: Refused | None = None
        for owner in (namespace, *(owner for owner, users in config.share_with.items() if namespace in users)):
            path = config.store_of(owner)
            try:
                with Store.open(path) as store, open_checkpoint(store, checkpoint_id) as found:
                    return path, found.manifest.provenance
            except Refused as error:
                if error.reason is not Reason.NOT_FOUND:
                    raise
                absent = absent or error
        raise absent or Refused(Reason.NOT_FOUND, f"There is no checkpoint {checkpoint_id!r}.")

    def _check_streak(self, pod: Pod, chosen: PodContainer, runtime: RuntimeContainer) -> None:
        """Give up on an application that does not live once restored.

        Raises:
            Refused: RESTORE_GIVEN_UP.
        """
        before = pod.annotations.get(names.GIVEN_UP_ANNOTATION, "0")
        restored = pod.annotations.get(names.START_ANNOTATION, "").startswith("restored")
        streak = 0
        if runtime.attempt and chosen.short_lived:
            streak = (int(before) if before.isdecimal() else 0) + (1 if restored else 0)
        damaged = bool(runtime.attempt and restored and chosen.said_unusable)
        self._streaks[runtime.id] = max(streak, SHORT_LIVES) if damaged else streak
        if damaged:
            message = f"The last restored start ended with {int(ExitCode.RESTORE_FAILED)}: the application found damage."
            raise Refused(Reason.RESTORE_GIVEN_UP, message)
        if streak >= SHORT_LIVES:
            raise Refused(Reason.RESTORE_GIVEN_UP, f"The last {streak} restored starts lived less than a minute.")

    # --- reporting --------------------------------------------------------------------------------------------

    def _report(self, pod: Pod, runtime: RuntimeContainer, start: _Start) -> None:
        """Say how a container started: event, annotation, metric."""
        if pod.annotations.get(names.START_ANNOTATION) == start.value or runtime.id in self._reported:
            return
        if start.mode == "restored":
            self._node.tell(pod, EventReason.RESTORED, start.restored_words(runtime.name), runtime.id)
        else:
            self._node.tell(pod, EventReason.STARTED_COLD, start.cold_words(runtime.name), runtime.id)
            if start.failed and runtime.id not in self._told:
                reason = Reason[start.reason]
                words = f"{reason.code}: {reason.summary} {reason.cure}"
                given_up = reason is Reason.RESTORE_GIVEN_UP
                kind = EventReason.RESTORE_GIVEN_UP if given_up else EventReason.RESTORE_FAILED
                self._node.tell(pod, kind, words, runtime.id)
        streak = self._streaks.get(runtime.id, 0)
        counter = str(streak) if streak else None
        self._node.annotate(pod, {names.START_ANNOTATION: start.value, names.GIVEN_UP_ANNOTATION: counter})
        with self._lock:
            self._reported.add(runtime.id)
        self._node.metrics.started(start.mode, start.reason)
        context = {"pod": str(pod), "id": start.checkpoint_id, "container": runtime.id[:12]}
        log.info(f"started {start.how}", reason=start.reason, seconds=start.seconds, **context)

    def _no_init(self, pod: Pod, runtime: RuntimeContainer, wish: Wish, error: Refused) -> float | None:
        """Judge a container whose PID 1 is not ChReK's init, or not yet."""
        if time.time() - runtime.started_at / 1e9 < YOUNG:
            return LATER / 4
        if wish is Wish.RESTORE and runtime.id not in self._told:
            self._told.add(runtime.id)
            refused = Refused(Reason.APP_IS_PID1, error.message)
            log.warning(str(refused), reason=refused.reason.code, pod=str(pod), container=runtime.id[:12])
            self._node.tell(pod, EventReason.RESTORE_REFUSED, refused, runtime.id)
        return None


def _waits(runtime: RuntimeContainer) -> bool:
    return runtime.environment.get(names.WAIT_VARIABLE, "").lower() in {"1", "true", "yes", "on"}


def _failure_of_the_capture(path: str, checkpoint_id: str, runtime: RuntimeContainer) -> Refused | None:
    """Return why a container waits in vain: its checkpoint's capture failed after its own start."""
    with suppress(ChrekError), Store.open(path) as store:
        found = failures.find(store, checkpoint_id, since=runtime.started_at / 1e9)
        if found is not None:
            reason = Reason.__members__.get(str(found.extra.get("reason")), Reason.NOT_FOUND)
            return Refused(reason, f"The capture that this container waits for failed: {found.error}")
    return None


def _allowed_by_environment(runtime: RuntimeContainer) -> frozenset[Reason]:
    return Reason.parse_list(runtime.environment.get(names.ALLOW_VARIABLE, "")) - NEVER_ALLOWED_RESTORING
