"""Reason codes are a closed list that programs rely on: none is there that no test has seen come out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from chrek.errors import Reason
from chrek.kube.events import EventReason

TESTS = Path(__file__).parents[1]
SOURCE = TESTS.parent / "src/chrek"


def _words(folder: Path, *, but: Path | None = None) -> frozenset[str]:
    texts = (path.read_text(encoding="utf-8") for path in folder.rglob("*.py") if path != but)
    return frozenset(word for text in texts for word in re.findall(r"[A-Za-z0-9_]+", text))


TESTED = _words(TESTS, but=Path(__file__))


@pytest.mark.parametrize("reason", list(Reason), ids=lambda reason: reason.code)
def test_reason(reason: Reason) -> None:
    """Some test names the code, as what it expects."""
    assert reason.code in TESTED


@pytest.mark.parametrize("reason", list(EventReason))
def test_event(reason: EventReason) -> None:
    """Some test names the event's reason."""
    assert str(reason) in TESTED


def test_every_reason_is_raised() -> None:
    """Every code of the list is named where it is raised; one that nothing raises is gone from the list."""
    raised = {
        word
        for path in SOURCE.rglob("*.py")
        if path.name != "errors.py"
        for word in re.findall(r"\bReason\.([A-Z0-9_]+)", path.read_text(encoding="utf-8"))
    }
    assert {reason.code for reason in Reason} <= raised
