"""What an agent that was killed had not said any more, found out from what is left of its capture.

A capture is told of in four places, and an agent can end between any two. The first is the signal file, upon which
the application usually ends; so the others follow from the file, as long as the container runs, and afterwards from
the store's marker, which names the container, or from how the container ended: its init repeats the signal
file's verdict in the termination message.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from chrek.errors import ChrekError, ExitCode, Reason
from chrek.kube import EventReason, names
from chrek.store import Store, open_checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chrek.artifact import Manifest
    from chrek.kube import Pod, PodContainer

CONTAINER_KEY: Final = "container_id"
"""The key of marker and signal file that names the container."""

_LAST_WORDS: Final = re.compile(r"checkpoint failed: (([A-Z][A-Z_0-9]*): .*)", re.DOTALL)
_LONGEST: Final = 4096


@dataclass(frozen=True)
class Verdict:
    """What came of a capture: the event, the annotation's first word, the metric's outcome and reason."""

    kind: EventReason
    message: str
    outcome: str
    reason: str = ""

    @property
    def result(self) -> str:
        """The annotation's first word."""
        return f"{self.outcome}/{self.reason}" if self.reason else self.outcome


def created(checkpoint_id: str, manifest: Manifest) -> Verdict:
    """Return what is said of a checkpoint that was taken; the same whoever says it, and whenever."""
    still, size = manifest.provenance.frozen_seconds, manifest.stored_bytes / 1e6
    words = f"Checkpoint {checkpoint_id} created: {size:.1f} MB, the application stood still for {still:.2f} s."
    return Verdict(EventReason.CHECKPOINT_CREATED, words, "created")


def failed(text: str, code: str, *, refused: bool) -> Verdict | None:
    """Return what is said of a capture that failed with this text; None where the code is none."""
    if code not in Reason.__members__ or not text.startswith(f"{code}: "):
        return None
    printable = "".join(letter if letter.isprintable() else " " for letter in text[:_LONGEST])
    kind = EventReason.CHECKPOINT_REFUSED if refused else EventReason.CHECKPOINT_FAILED
    return Verdict(kind, printable, "refused" if refused else "failed", code)


def from_signal(told: Mapping[str, object], container: str) -> Verdict | None:
    """Return the failure that a container's signal file tells, None when it tells none of this container."""
    if told.get("success") is not False or told.get(CONTAINER_KEY) != container:
        return None
    return failed(str(told.get("error")), str(told.get("reason")), refused=told.get("refused") is True)


def from_ended(pod: Pod, chosen: PodContainer, container: str, store: str) -> Verdict | None:
    """Return what came of the capture of a container that has ended, None when there was none or nobody can know."""
    for checkpoint_id in _ids(pod, chosen):
        with suppress(ChrekError), Store.open(store) as opened, open_checkpoint(opened, checkpoint_id) as found:
            if found.marker.extra.get(CONTAINER_KEY) == container:
                return created(checkpoint_id, found.manifest)
    words = _LAST_WORDS.fullmatch(chosen.last_words)
    if words is None or chosen.exit_code not in {ExitCode.REFUSED, ExitCode.CAPTURE_FAILED}:
        return None
    return failed(words[1], words[2], refused=chosen.exit_code == ExitCode.REFUSED)


def _ids(pod: Pod, chosen: PodContainer) -> list[str]:
    """Return the ids that the pod itself names, in the order in which they count."""
    location = chosen.variables.get(names.LOCATION_VARIABLE) or ""
    named = (pod.labels.get(names.HASH_LABEL), chosen.variables.get(names.HASH_VARIABLE), location.rpartition("/")[2])
    return list(dict.fromkeys(each for each in named if each))
