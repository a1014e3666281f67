"""A worker process, from outside."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from chrek.agent import work
from chrek.criu.bundle import VARIABLE
from chrek.errors import CaptureFailed, Reason, Refused, RestoreFailed


@pytest.fixture(autouse=True)
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that looks like CRIU's; none of these tests comes as far as running it."""
    for name in ("criu", "ld.so"):
        (tmp_path / name).touch()
    monkeypatch.setenv(VARIABLE, str(tmp_path))


def _request(verb: str, pid1: int, **more: object) -> dict[str, object]:
    capture = {"location": None, "liveness": None, "image": None, "build_id": None, "namespace": None}
    restore = {"by": "test", "verify": "full", "refuse": None}
    common = {"verb": verb, "pid1": pid1, "store": "/nonexistent/store", "id": "x", "deadline": 100, "allow": []}
    return {**common, **capture, **restore, "service_account": None, "extra": {}, **more}


def test_refusal_comes_back_as_it_was_raised() -> None:
    """Reason, message, cure and kind of the worker's error are those of the engine."""
    with pytest.raises(Refused) as caught:
        work.run(_request("restore", os.getpid()), stop=work.Stop(), on_phase=lambda _: None)
    assert caught.value.reason is Reason.APP_NOT_FOUND
    assert str(os.getpid()) in caught.value.message
    assert caught.value.cure


@pytest.mark.parametrize(("verb", "kind"), [("capture", CaptureFailed), ("restore", RestoreFailed)])
def test_fault_in_the_worker_is_a_failed_operation(verb: str, kind: type[Exception]) -> None:
    """A worker that dies of a fault of its own is an error with what is known, not an exception of the agent's."""
    with pytest.raises(kind, match="ended with exit code 1"):
        work.run({"verb": verb, "deadline": 100}, stop=work.Stop(), on_phase=lambda _: None)


def test_stop_before_the_start_is_kept() -> None:
    """A worker that is to be stopped before it exists is stopped as soon as it does."""
    stop = work.Stop()
    stop.ask("first")
    stop.ask("second")
    process = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    stop.attach(process)
    try:
        assert process.wait(60) == -15
    finally:
        process.kill()
        process.wait()
    assert stop.asked == "first"
