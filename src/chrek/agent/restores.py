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
from typing import TYPE_CHECKING, Final

from chrek.agent import log, work
from chrek.agent.captures import image_of
from chrek.agent.node import NEVER_ALLOWED, Node, allowed, require_supported
from chrek.errors import ChrekError, Reason, Refused, UsageError
from chrek.kube import ApiFailed, EventReason, annotate, names, selection
from chrek.kube.selection import Wish
from chrek.store import Store, open_checkpoint
from chrek.system import initstate

if TYPE_CHECKING:
    from chrek.kube import Pod, PodContainer
    from chrek.runtime.container import Container as RuntimeContainer
    from chrek.system.initpublish import InitState

SOON: Final = 0.1
LATER: Final = 1.0
SLOWLY: Final = 5.0
YOUNG: Final = 15.0
"""Seconds after a container's start until what is not our init counts as something else."""
DEADLINE: Final = 600
"""Seconds for one restore."""
SHORT_LIVES: Final = 3
"""Restored starts in a row that may end within a minute."""


class Restores:
    """The restores and starts of one node."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._lock = threading.Lock()
        # Only to save work and double counts within one life: the truth is in the annotation.
        self._reported: dict[str, str] = {}
        self._told: set[str] = set()
        self._streaks: dict[str, int] = {}

    def forget(self, pod: Pod) -> None:
        """Forget what concerns a pod that is gone."""
        with self._lock:
            for each in pod.containers:
                key = each.id.rpartition("://")[2]
                self._reported.pop(key, None)
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
                self._report(pod, runtime, state)
                return None
            case "waiting":
                return LATER
        return SOON

    # --- restoring --------------------------------------------------------------------------------------------

    def _restore(self, pod: Pod, chosen: PodContainer, runtime: RuntimeContainer) -> float | None:
        context: dict[str, object] = {"pod": str(pod), "container": runtime.id[:12]}
        refusal: ChrekError | None = None
        checkpoint_id, allow = "", frozenset[Reason]()
        try:
            require_supported(pod)
            checkpoint_id = selection.for_restore(pod, runtime.environment).checkpoint_id
            context["id"] = checkpoint_id
            allow = allowed(pod) | _allowed_by_environment(runtime)
            self._check_streak(pod, chosen, runtime)
            self._check_owner(pod, runtime, checkpoint_id, allow)
        except ChrekError as error:
            if isinstance(error, ApiFailed):
                raise
            if error.reason is Reason.NOT_FOUND and _waits(runtime):
                return LATER
            refusal = error
        request = {
            "verb": "restore",
            "pid1": runtime.pid,
            "by": f"the agent of node {self._node.config.node}",
            "store": self._node.config.store_of(pod.namespace),
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
        return 0.0

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
                self._node.events.post_error(pod, kind, error, container_id=runtime.id)

    def _check_owner(self, pod: Pod, runtime: RuntimeContainer, checkpoint_id: str, allow: frozenset[Reason]) -> None:
        """Look at whose checkpoint it is, and of which image; the rest is the engine's to compare.

        Raises:
            Refused: NOT_FOUND, TENANT_MISMATCH, IMAGE_MISMATCH, or what makes it unreadable.
        """
        config = self._node.config
        with Store.open(config.store_of(pod.namespace)) as store, open_checkpoint(store, checkpoint_id) as found:
            there = found.manifest.provenance
        if not config.may_use(owner=there.namespace, user=pod.namespace):
            message = (
                f"Checkpoint {checkpoint_id} was taken in namespace {there.namespace}, this pod is in {pod.namespace}."
            )
            raise Refused(Reason.TENANT_MISMATCH, message)
        here = image_of(runtime)
        known = bool(there.image) and (there.image or "").startswith("sha256:") and here.startswith("sha256:")
        if known and there.image != here and Reason.IMAGE_MISMATCH not in allow:
            message = f"Checkpoint {checkpoint_id} was taken of image {there.image}; this container's is {here}."
            raise Refused(Reason.IMAGE_MISMATCH, message)

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
        self._streaks[runtime.id] = streak
        if streak >= SHORT_LIVES:
            raise Refused(Reason.RESTORE_GIVEN_UP, f"The last {streak} restored starts lived less than a minute.")

    # --- reporting --------------------------------------------------------------------------------------------

    def _report(self, pod: Pod, runtime: RuntimeContainer, state: InitState) -> None:
        """Say how a container started: event, annotation, metric."""
        how = "restored" if state.mode == "restored" else f"cold/{state.reason or 'NONE'}"
        value = f"{how} seconds={state.seconds or 0:.3f}"
        if pod.annotations.get(names.START_ANNOTATION) == value or self._reported.get(runtime.id) == value:
            return
        if state.mode == "restored":
            self._node.tell(pod, EventReason.RESTORED, _restored_words(state, runtime), runtime)
        else:
            self._node.tell(pod, EventReason.STARTED_COLD, _cold_words(state, runtime), runtime)
            if state.reason in Reason.__members__ and state.reason != "NOT_FOUND" and runtime.id not in self._told:
                reason = Reason[state.reason]
                self._node.tell(
                    pod, EventReason.RESTORE_FAILED, f"{reason.code}: {reason.summary} {reason.cure}", runtime
                )
        streak = self._streaks.get(runtime.id, 0)
        annotations = {names.START_ANNOTATION: value, names.GIVEN_UP_ANNOTATION: str(streak) if streak else None}
        try:
            annotate(self._node.api, pod, annotations)
        except ApiFailed as error:
            if error.status not in (404, 422):  # the pod is gone
                raise
        self._reported[runtime.id] = value
        self._node.metrics.started(state.mode, state.reason)
        log.info(
            f"started {how}", pod=str(pod), id=state.checkpoint_id, container=runtime.id[:12],
            reason=state.reason, seconds=state.seconds,
        )  # fmt: skip

    def _no_init(self, pod: Pod, runtime: RuntimeContainer, wish: Wish, error: Refused) -> float | None:
        """Judge a container whose PID 1 is not ChReK's init, or not yet."""
        if time.time() - runtime.started_at / 1e9 < YOUNG:
            return LATER / 4
        if wish is Wish.RESTORE and runtime.id not in self._told:
            self._told.add(runtime.id)
            refused = Refused(Reason.APP_IS_PID1, error.message)
            log.warning(str(refused), reason=refused.reason.code, pod=str(pod), container=runtime.id[:12])
            self._node.events.post_error(pod, EventReason.RESTORE_REFUSED, refused, container_id=runtime.id)
        return None


def _restored_words(state: InitState, runtime: RuntimeContainer) -> str:
    return f"Container {runtime.name} runs from checkpoint {state.checkpoint_id}, {state.seconds or 0:.2f} s after its start."


def _cold_words(state: InitState, runtime: RuntimeContainer) -> str:
    why = f": {state.reason}" if state.reason else ""
    return f"Container {runtime.name} started cold{why}, not from checkpoint {state.checkpoint_id}."


def _waits(runtime: RuntimeContainer) -> bool:
    return runtime.environment.get(names.WAIT_VARIABLE, "").lower() in {"1", "true", "yes", "on"}


def _allowed_by_environment(runtime: RuntimeContainer) -> frozenset[Reason]:

    return Reason.parse_list(runtime.environment.get(names.ALLOW_VARIABLE, "")) - NEVER_ALLOWED
