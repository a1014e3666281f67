"""Which pod is looked at when: every change of a pod, and what a look asked for, leads to the next look.

One thread decides, a pool looks; no pod is looked at twice at a time. A look that fails for want of the API
server or the runtime is repeated: looks have no memory, so nothing is lost by it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import heapq
import itertools
import queue
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Final

from chrek.agent import log
from chrek.agent.captures import SHUTDOWN, Captures
from chrek.agent.restores import Restores
from chrek.errors import ChrekError, Refused
from chrek.kube import EventReason, selection
from chrek.kube.selection import Wish

if TYPE_CHECKING:
    from chrek.agent.node import Node
    from chrek.kube import Pod

LOOKS: Final = 32
"""Looks at a time; captures have a limit of their own, below this."""
AGAIN: Final = 3.0
"""Seconds after a look that failed; twice as long after each further one, up to `RARELY`."""
RARELY: Final = 60.0
STUCK: Final = 60.0


class Controller:
    """Looks at the pods of a node until it is stopped."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.captures = Captures(node)
        self.restores = Restores(node)
        self._pods: dict[str, Pod] = {}
        self._news: queue.SimpleQueue[tuple[str, object]] = queue.SimpleQueue()
        self._due: list[tuple[float, int, str]] = []
        self._order = itertools.count()
        self._busy: set[str] = set()
        self._missed: set[str] = set()
        self._unclear: set[str] = set()
        self._failures: Counter[str] = Counter()
        self._beat = time.monotonic()
        self._stopping = False
        self._pool = concurrent.futures.ThreadPoolExecutor(LOOKS, thread_name_prefix="look")
        self._thread = threading.Thread(target=self._run, name="controller", daemon=True)
        node.metrics.queue(self.captures.slots.queued)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def pod(self, pod: Pod) -> None:
        """Take note of a pod's newest state; returns at once."""
        self._news.put(("pod", pod))

    def gone(self, pod: Pod) -> None:
        """Take note that a pod is gone; returns at once."""
        self._news.put(("gone", pod))

    def problem(self) -> str | None:
        """Say what is wrong with the controller itself, None: nothing."""
        silent = time.monotonic() - self._beat
        return f"the controller has not moved for {silent:.0f} s" if silent > STUCK else None

    def stop(self) -> None:
        """Undo captures under way, let restores end, and return."""
        self._news.put(("stop", None))
        self._thread.join()
        self.captures.stop(SHUTDOWN)
        self._pool.shutdown(wait=True, cancel_futures=True)

    # --- the deciding thread ----------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping:
            self._beat = time.monotonic()
            wait = min(self._due[0][0] - self._beat, 5.0) if self._due else 5.0
            try:
                self._take(*self._news.get(timeout=max(wait, 0.0)))
            except queue.Empty:
                pass
            while self._due and self._due[0][0] <= time.monotonic():
                self._begin(heapq.heappop(self._due)[2])

    def _take(self, what: str, value: object) -> None:
        match what:
            case "stop":
                self._stopping = True
            case "pod":
                self._know(value)  # type: ignore[arg-type]
            case "gone":
                self._forget(value)  # type: ignore[arg-type]
            case "looked":
                self._looked(*value)  # type: ignore[misc]

    def _know(self, pod: Pod) -> None:
        if not selection.wishes(pod):
            return
        self._pods[pod.uid] = pod
        if pod.deleting:
            self.captures.forget(pod)
        self._begin(pod.uid)

    def _forget(self, pod: Pod) -> None:
        self.captures.forget(pod)
        self.restores.forget(pod)
        self._pods.pop(pod.uid, None)
        self._unclear.discard(pod.uid)
        self._failures.pop(pod.uid, None)

    def _begin(self, uid: str) -> None:
        pod = self._pods.get(uid)
        if pod is None:
            return
        if uid in self._busy:
            self._missed.add(uid)
            return
        self._busy.add(uid)
        self._pool.submit(self._look_safely, pod)

    def _looked(self, uid: str, again: float | None) -> None:
        self._busy.discard(uid)
        if uid in self._missed:
            self._missed.discard(uid)
            again = 0.0
        if again is not None and uid in self._pods:
            heapq.heappush(self._due, (time.monotonic() + again, next(self._order), uid))

    # --- the pool ---------------------------------------------------------------------------------------------

    def _look_safely(self, pod: Pod) -> None:
        again: float | None = min(AGAIN * 2 ** self._failures[pod.uid], RARELY)
        try:
            again = self._look(pod)
            self._failures.pop(pod.uid, None)
        except ChrekError as error:
            self._failures[pod.uid] += 1
            self._node.trouble(error, pod=str(pod))
        except Exception:  # noqa: BLE001 - one pod's trouble is not the others'
            self._failures[pod.uid] += 1
            log.LOGGER.exception("a look failed", extra={"pod": str(pod)})
        finally:
            self._news.put(("looked", (pod.uid, again)))

    def _look(self, pod: Pod) -> float | None:
        if pod.deleting:
            return None
        wishes = selection.wishes(pod)
        if pod.phase in {"Succeeded", "Failed"}:
            if Wish.CAPTURE in wishes:
                with contextlib.suppress(Refused):
                    self.captures.look_back(pod, selection.container(pod))
            return None
        try:
            chosen = selection.container(pod)
        except Refused as error:
            if pod.uid not in self._unclear:
                self._unclear.add(pod.uid)
                kind = EventReason.CHECKPOINT_REFUSED if Wish.CAPTURE in wishes else EventReason.RESTORE_REFUSED
                log.warning(str(error), pod=str(pod), reason=error.reason.code)
                self._node.tell(pod, kind, error)
            return None
        dues = []
        if wishes & {Wish.RESTORE, Wish.REPORT}:
            wish = Wish.RESTORE if Wish.RESTORE in wishes else Wish.REPORT
            dues.append(self.restores.look(pod, chosen, wish))
        if Wish.CAPTURE in wishes:
            dues.append(self.captures.look(pod, chosen))
        return min((each for each in dues if each is not None), default=None)
