"""Fixtures of the system tests: containers that are always removed, and whose logs show when a test fails."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chrek.store.layout import Store
from containers import Container, bundle, remove_leftovers

_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Iterator[None] | pytest.TestReport:  # the type of a wrapper hook
    """Note on the test whether its body failed, for the fixtures that end after it."""
    report: pytest.TestReport = yield  # type: ignore[misc,assignment]
    if call.when == "call":
        item.stash[_FAILED] = report.failed
    return report


@pytest.fixture(autouse=True, scope="session")
def _no_leftovers() -> None:
    """Remove the containers that killed runs left behind."""
    remove_leftovers()


@pytest.fixture
def container(request: pytest.FixtureRequest) -> Iterator[Callable[..., Container]]:
    """Make containers as `Container` does; they are removed after the test, their logs printed if it failed."""
    made: list[Container] = []
    with contextlib.ExitStack() as removal:

        def make(*args: object, **options: object) -> Container:
            made.append(Container(*args, **options))  # type: ignore[arg-type]
            removal.callback(made[-1].delete)
            return made[-1]

        yield make
        if request.node.stash.get(_FAILED, False):
            for one in made:
                print(f"--- {one.name} stdout\n{one.log}\n--- {one.name} stderr\n{one.err}")  # noqa: T201


@pytest.fixture(scope="session")
def criu_bundle() -> Path:
    """Return the directory of the CRIU bundle."""
    return bundle()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Return an empty store on disk."""
    with Store.open(tmp_path / "store", create=True) as opened:
        yield opened
