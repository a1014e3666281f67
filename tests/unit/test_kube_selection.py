"""Which pod, which container, which checkpoint."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chrek.errors import ChrekError, Reason
from chrek.kube import names, selection
from chrek.kube.leases import lease_name
from chrek.kube.pods import Pod, PodContainer
from chrek.kube.selection import Wish

MAIN = PodContainer(
    name="main", image="app:1", variables={}, readiness_probe=True, sidecar=False, id="c", running=True, restarts=0
)
POD = Pod(
    namespace="team",
    name="app",
    uid="u",
    version="1",
    node="n",
    service_account="default",
    labels={names.SOURCE_LABEL: "true"},
    annotations={},
    phase="Running",
    ready=True,
    deleting=False,
    containers=(MAIN,),
)
JOB = {names.SIGNAL_VARIABLE: "/s/done", names.HASH_VARIABLE: "abc", names.LOCATION_VARIABLE: "/checkpoints/abc"}


def named(*containers: str, sidecars: tuple[str, ...] = ()) -> tuple[PodContainer, ...]:
    """Containers of these names."""
    plain = [dataclasses.replace(MAIN, name=name) for name in containers]
    return (*plain, *(dataclasses.replace(MAIN, name=name, sidecar=True) for name in sidecars))


def refusal(pod: Pod, environment: dict[str, str]) -> Reason:
    """Why it is not captured."""
    with pytest.raises(ChrekError) as caught:
        selection.for_capture(pod, environment)
    return caught.value.reason


@pytest.mark.parametrize(
    ("labels", "variables", "wanted"),
    [
        ({names.SOURCE_LABEL: "true"}, {}, {Wish.CAPTURE}),
        ({names.RESTORE_LABEL: "true"}, {names.HASH_VARIABLE: "a"}, {Wish.RESTORE}),
        ({names.SOURCE_LABEL: "true", names.RESTORE_LABEL: "true"}, {}, {Wish.CAPTURE, Wish.RESTORE}),
        ({}, {names.HASH_VARIABLE: None}, {Wish.REPORT}),
        ({names.SOURCE_LABEL: "false"}, {}, set()),
        ({}, {"OTHER": "x"}, set()),
    ],
)
def test_pod_is_ours_by_label_or_by_variable(
    labels: dict[str, str], variables: dict[str, str | None], wanted: set[Wish]
) -> None:
    """Labels say what is wanted; a pod with only the id variable is reported on."""
    pod = dataclasses.replace(POD, labels=labels, containers=(dataclasses.replace(MAIN, variables=variables),))
    assert selection.wishes(pod) == wanted


@pytest.mark.parametrize(
    ("containers", "annotations", "wanted"),
    [
        (named("only"), {}, "only"),
        (named("a", "main"), {}, "main"),
        (named("a", "b"), {names.CONTAINER_ANNOTATION: "b"}, "b"),
        (named("a", "main"), {names.DEFAULT_CONTAINER_ANNOTATION: "a"}, "a"),
        (named("a", "b"), {names.CONTAINER_ANNOTATION: "b", names.DEFAULT_CONTAINER_ANNOTATION: "a"}, "b"),
        (named("app", sidecars=("proxy",)), {}, "app"),
        (named("a", "b"), {}, None),
        (named("a"), {names.CONTAINER_ANNOTATION: "x"}, None),
        (named("a", "b", sidecars=("main",)), {}, None),
    ],
)
def test_container_is_chosen_by_annotation_name_or_being_alone(
    containers: tuple[PodContainer, ...], annotations: dict[str, str], wanted: str | None
) -> None:
    """Our annotation, kubectl's, the name main, the only one; anything else is refused."""
    pod = dataclasses.replace(POD, containers=containers, annotations=annotations)
    if wanted is None:
        assert refusal(pod, JOB) is Reason.CONTAINER_UNCLEAR
    else:
        assert selection.for_capture(pod, JOB).container == wanted


def test_container_without_readiness_probe_is_refused() -> None:
    """It would count as ready while it still loads."""
    pod = dataclasses.replace(POD, containers=(dataclasses.replace(MAIN, readiness_probe=False),))
    assert refusal(pod, JOB) is Reason.NO_READINESS_PROBE


@pytest.mark.parametrize(
    ("label", "environment", "wanted"),
    [
        (None, JOB, "abc"),
        ("abc", JOB, "abc"),
        (None, {names.SIGNAL_VARIABLE: "/s", names.LOCATION_VARIABLE: "/checkpoints/xyz/"}, "xyz"),
        ("abc", {names.SIGNAL_VARIABLE: "/s"}, "abc"),
        ("other", JOB, Reason.ID_MISMATCH),
        (None, JOB | {names.LOCATION_VARIABLE: "/checkpoints/other"}, Reason.ID_MISMATCH),
        (None, {names.SIGNAL_VARIABLE: "/s"}, Reason.BAD_ID),
        (None, {names.SIGNAL_VARIABLE: "/s", names.HASH_VARIABLE: "../x"}, Reason.BAD_ID),
        # Not in checkpoint mode the variables say what it was restored from.
        ("new", {names.HASH_VARIABLE: "old"}, "new"),
        (None, {names.HASH_VARIABLE: "old"}, Reason.BAD_ID),
    ],
)
def test_id_of_a_capture(label: str | None, environment: dict[str, str], wanted: str | Reason) -> None:
    """Label, variable and location must agree in checkpoint mode; elsewhere the label alone counts."""
    pod = POD if label is None else dataclasses.replace(POD, labels={**POD.labels, names.HASH_LABEL: label})
    if isinstance(wanted, Reason):
        assert refusal(pod, environment) is wanted
    else:
        assert selection.for_capture(pod, environment).checkpoint_id == wanted


def test_restored_pod_that_is_captured_again_keeps_the_two_ids_apart() -> None:
    """With both labels the variable says what to restore and the label what to write."""
    labels = {names.SOURCE_LABEL: "true", names.RESTORE_LABEL: "true", names.HASH_LABEL: "second"}
    pod = dataclasses.replace(POD, labels=labels)
    environment = {names.HASH_VARIABLE: "first"}
    assert selection.for_restore(pod, environment).checkpoint_id == "first"
    assert selection.for_capture(pod, environment).checkpoint_id == "second"


@given(st.lists(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", fullmatch=True), min_size=2, max_size=2, unique=True))
def test_ids_have_leases_of_their_own(ids: list[str]) -> None:
    """Different ids never share a lease, and each name is one the API server takes."""
    first, second = (lease_name(each) for each in ids)
    assert first != second
    for name in (first, second):
        assert len(name) <= 253
        assert all(part and part.strip("-") == part for part in name.split("."))
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-.")


@pytest.mark.parametrize(
    ("labels", "variables", "wanted"),
    [
        ({}, {}, set()),
        ({names.HASH_LABEL: "a"}, {}, {"a"}),
        ({names.HASH_LABEL: "a"}, {names.HASH_VARIABLE: "b"}, {"a", "b"}),
        ({}, {names.HASH_VARIABLE: "b", names.LOCATION_VARIABLE: "/checkpoints/c/"}, {"b", "c"}),
        ({}, {names.HASH_VARIABLE: None}, {None}),
        ({names.HASH_LABEL: "a"}, {names.HASH_VARIABLE: None, names.LOCATION_VARIABLE: None}, {"a"}),
    ],
)
def test_all_ids_that_a_pod_names(
    labels: dict[str, str], variables: dict[str, str | None], wanted: set[str | None]
) -> None:
    """Label, variables of any container; what comes from elsewhere is unknown unless the label says it."""
    containers = (MAIN, dataclasses.replace(MAIN, name="other", variables=variables))
    assert selection.named(dataclasses.replace(POD, labels=labels, containers=containers)) == wanted
