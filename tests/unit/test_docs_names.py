"""Names that users type or match on are public: each variable, label, annotation, event and metric stands in the documents."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from chrek.agent.metrics import Metrics
from chrek.entrypoint.environment import parse
from chrek.kube import names
from chrek.kube.events import EventReason

REPO = Path(__file__).parents[2]
GUIDE = (REPO / "docs/guide.md").read_text()
TROUBLESHOOTING = (REPO / "docs/troubleshooting.md").read_text()
ENTRYPOINT = REPO / "src/chrek/entrypoint"


class Recording(dict[str, str]):
    """An environment that keeps what it is asked for."""

    def __init__(self, **values: str) -> None:
        super().__init__(**values)
        self.asked: set[str] = set(values)

    def get(self, key: str, default: str | None = None) -> str | None:  # type: ignore[override]
        """Return a value."""
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)


def variables() -> list[str]:
    """Return every variable that the init looks at, in any mode."""
    job = Recording(
        DYN_CHECKPOINT_SIGNAL_FILE="/s/done",
        DYN_CHECKPOINT_READY_FILE="/tmp/ready",
        DYN_CHECKPOINT_HASH="one",
        DYN_CHECKPOINT_LOCATION="/checkpoints/one",
        DYN_CHECKPOINT_STORAGE_TYPE="pvc",
    )
    pod = Recording(DYN_CHECKPOINT_HASH="one")
    for each in (job, pod):
        parse(each)
    return sorted(job.asked | pod.asked)


def metrics() -> list[str]:
    """Return the families that /metrics has under our name, as Prometheus calls them."""
    families = Metrics().registry.collect()
    return sorted(
        f"{family.name}_total" if family.type == "counter" else family.name
        for family in families
        if family.name.startswith("chrek_")
    )


@pytest.mark.parametrize("name", variables())
def test_variable(name: str) -> None:
    """The guide's tables have each variable that the init looks at."""
    assert re.search(rf"^\|[^|]*`{name}`", GUIDE, re.MULTILINE), f"{name} has no row in docs/guide.md"


@pytest.mark.parametrize(
    "name", sorted(value for key, value in vars(names).items() if key.endswith(("_LABEL", "_ANNOTATION")))
)
def test_label_or_annotation(name: str) -> None:
    """The guide names each label and annotation that ChReK reads or writes."""
    said = "kubectl's default-container" if name == names.DEFAULT_CONTAINER_ANNOTATION else name
    assert said in GUIDE


@pytest.mark.parametrize("reason", [str(reason) for reason in EventReason])
def test_event(reason: str) -> None:
    """The troubleshooting page names each event."""
    assert re.search(rf"\b{reason}\b", TROUBLESHOOTING)


@pytest.mark.parametrize("name", metrics())
def test_metric(name: str) -> None:
    """The guide names each number, one by one or by a name with a star."""
    stars = [word.replace("*", r"\w+") for word in re.findall(r"`(chrek_[\w*]+)", GUIDE)]
    assert any(re.fullmatch(star, name) for star in stars), f"{name} is not in docs/guide.md"
