"""What the agent answers over HTTP, and what Prometheus reads."""

from __future__ import annotations

import urllib.error
import urllib.request

import pytest

from chrek.agent.metrics import Metrics
from chrek.agent.web import Web


def _get(web: Web, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{web.port}{path}", timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_checks_say_what_is_wrong() -> None:
    """A check that finds something answers 503 with it, else 200; any other path is 404."""
    with Web(0, healthy=lambda: None, ready=lambda: "no store", metrics=lambda: b"m 1\n") as web:
        assert _get(web, "/healthz") == (200, "ok\n")
        assert _get(web, "/readyz") == (503, "no store\n")
        assert _get(web, "/metrics?x=1") == (200, "m 1\n")
        assert _get(web, "/etc/passwd")[0] == 404


@pytest.mark.parametrize(
    "line",
    [
        'chrek_checkpoint_operations_total{outcome="refused",reason="NO_TMP"} 1.0',
        'chrek_restore_operations_total{outcome="restored",reason=""} 1.0',
        'chrek_starts_total{mode="cold",reason="NO_AGENT"} 1.0',
        'chrek_starts_total{mode="restored",reason="none"} 1.0',
        "chrek_checkpoint_duration_seconds_sum 2.0",
        "chrek_checkpoint_size_bytes_sum 4e+09",
        'chrek_rate_bytes_per_second{operation="checkpoint"} 2e+09',
        'chrek_phase_duration_seconds_sum{operation="checkpoint",phase="dump"} 0.5',
        "chrek_checkpoint_frozen_seconds_sum 0.25",
        'chrek_operations_in_progress{operation="checkpoint"} 1.0',
        "chrek_captures_queued 3.0",
        "process_resident_memory_bytes",
    ],
)
def test_metrics(line: str) -> None:
    """Each documented number is there under its name."""
    metrics = Metrics()
    metrics.ended("checkpoint", "refused", "NO_TMP")
    metrics.ended("restore", "restored")
    metrics.started("cold", "NO_AGENT")
    metrics.started("restored", "")
    metrics.measured("checkpoint", seconds=2.0, size=4_000_000_000, phases={"dump": 0.5})
    metrics.frozen(0.25)
    metrics.under_way("checkpoint", 1)
    metrics.queue(lambda: 3)
    metrics.versions(criu="4.2.1", driver="", runtime="containerd v2.2.9")
    assert line in metrics.text().decode()
