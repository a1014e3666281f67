"""What an agent makes of the traces of one that was killed; the workload may have written them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from chrek.agent import unsaid
from chrek.kube import EventReason, names
from chrek.store import Staging, Store
from sample_store import CONTENTS, fill, make_manifest
from unit.test_kube_selection import MAIN, POD

FAILED: dict[str, object] = {
    "success": False,
    "container_id": "c1",
    "reason": "NO_SPACE",
    "error": "NO_SPACE: 5 GB are missing. Free them.",
    "refused": True,
}


def test_a_signal_file_that_tells_of_a_failure() -> None:
    """Event, annotation and metric are those that its writer would have given."""
    verdict = unsaid.from_signal(FAILED, "c1")
    assert verdict is not None
    assert (verdict.kind, verdict.message) == (EventReason.CHECKPOINT_REFUSED, FAILED["error"])
    assert (verdict.result, verdict.outcome, verdict.reason) == ("refused/NO_SPACE", "refused", "NO_SPACE")
    failed = unsaid.from_signal({**FAILED, "refused": False}, "c1")
    assert failed is not None
    assert failed.result == "failed/NO_SPACE"


@pytest.mark.parametrize(
    "change",
    [
        {"success": True},
        {"success": "no"},
        {"container_id": "c2"},
        {"reason": "NO_SUCH_CODE", "error": "NO_SUCH_CODE: x"},
        {"error": "another text"},
        {"reason": ["NO_SPACE"]},
        {"error": None},
    ],
)
def test_a_signal_file_that_makes_no_sense(change: dict[str, object]) -> None:
    """What no agent would have written is nothing."""
    assert unsaid.from_signal({**FAILED, **change}, "c1") is None


def test_text_of_a_workload_is_one_line_of_letters() -> None:
    """Control characters do not get into events and logs."""
    verdict = unsaid.from_signal({**FAILED, "error": "NO_SPACE: a\x1b[31m\nb"}, "c1")
    assert verdict is not None
    assert verdict.message == "NO_SPACE: a [31m b"


@pytest.mark.parametrize(
    ("code", "words", "result"),
    [
        (172, "checkpoint failed: NO_SPACE: full.", "refused/NO_SPACE"),
        (170, "checkpoint failed: DUMP_FAILED: no.", "failed/DUMP_FAILED"),
        (1, "checkpoint failed: NO_SPACE: full.", None),
        (172, "something else: NO_SPACE: full.", None),
        (172, "checkpoint failed: NO_SUCH_CODE: x", None),
        (172, "", None),
    ],
)
def test_how_a_container_ended(tmp_path: Path, code: int, words: str, result: str | None) -> None:
    """The init's own exit codes and termination message tell of the failure; an application's do not."""
    ended = dataclasses.replace(MAIN, exit_code=code, last_words=words, running=False)
    verdict = unsaid.from_ended(POD, ended, "c1", str(tmp_path))
    assert (verdict.result if verdict else None) == result


def test_a_checkpoint_of_the_container_is_there(tmp_path: Path) -> None:
    """The marker in the store names the container, wherever the pod names the id."""
    with Store.open(tmp_path, create=True) as store:
        with Staging.create(store, "one") as staging:
            staging.publish(make_manifest("one", fill(staging, CONTENTS)), extra={"container_id": "c1"})
    by_variable = dataclasses.replace(MAIN, variables={names.LOCATION_VARIABLE: "/checkpoints/one"}, running=False)
    by_label = dataclasses.replace(POD, labels={names.HASH_LABEL: "one"})
    for pod, container in ((POD, by_variable), (by_label, MAIN)):
        verdict = unsaid.from_ended(pod, container, "c1", str(tmp_path))
        assert verdict is not None
        assert verdict.result == "created"
        assert unsaid.from_ended(pod, container, "c2", str(tmp_path)) is None
