"""Whether a checkpoint fits: against this machine, and a process of the test as the container's first."""

from __future__ import annotations

import dataclasses
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chrek.artifact import Application, Environment, Facts, Manifest, OpenFile
from chrek.engine import compatibility, facts
from chrek.engine.container import Container
from chrek.errors import Reason, Refused
from chrek.system.ids import HostPid
from sample_store import make_manifest

Start = Callable[[dict[str, str]], Container]


@pytest.fixture
def container() -> Iterator[Start]:
    """Return what starts a process with an environment, which stands for a container's first one."""
    processes = []

    def start(environment: dict[str, str]) -> Container:
        argv = [sys.executable, "-SIc", "print(flush=True); input()"]
        process = subprocess.Popen(argv, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        return Container(HostPid(process.pid))

    yield start
    for process in processes:
        with process:
            process.kill()


def manifest(*, environment: tuple[str, ...] | None = (), files: tuple[OpenFile, ...] = (), **other: Any) -> Manifest:
    """Return the manifest of a checkpoint that fits this machine in all that is not given."""
    found = make_manifest("x", {})
    here: dict[str, Any] = {"architecture": platform.machine(), "cpu_features": facts.cpu_features(), "memory_bytes": 1}
    names = None if environment is None else Environment(names=environment, sha256="0" * 64)
    application: Application = dataclasses.replace(found.application, environment=names)
    return dataclasses.replace(found, facts=Facts(**{**here, **other}), application=application, open_files=files)


# --- variables --------------------------------------------------------------------------------------


def test_changed_variables(container: Start) -> None:
    """Variables that one of the two environments lacks are named, sorted; values are not compared."""
    here = container({"A": "1", "C": "3"})
    assert compatibility.changed_variables(manifest(environment=("A", "B", "D")), here) == ["B", "C", "D"]
    assert compatibility.changed_variables(manifest(environment=("A", "C")), here) == []


def test_no_recorded_environment(container: Start) -> None:
    """A checkpoint that recorded no environment has none to compare."""
    assert compatibility.changed_variables(manifest(environment=None), container({"A": "1"})) == []


@pytest.mark.parametrize(
    "name",
    [
        *("HOSTNAME", "DEBUG", "CUDA_VISIBLE_DEVICES", "DYN_X", "CHREK_X", "CRIU_X", "POD_IP", "NODE_NAME", "NVIDIA_X"),
        *("REDIS_SERVICE_HOST", "REDIS_PORT", "REDIS_PORT_6379_TCP_ADDR", "WAIT_FOR_CHECKPOINT"),
    ],
)
def test_variables_that_any_two_pods_differ_in(container: Start, name: str) -> None:
    """The cluster's own variables and ChReK's are not compared, on either side."""
    assert compatibility.changed_variables(manifest(environment=(name,)), container({})) == []
    assert compatibility.changed_variables(manifest(), container({name: "x"})) == []


@pytest.mark.parametrize("name", ["CUDA_HOME", "MY_DEBUG", "HOSTNAME2", "XDYN_", "path"])
def test_variables_that_count(container: Start, name: str) -> None:
    """Names that only look alike are compared."""
    assert compatibility.changed_variables(manifest(environment=(name,)), container({})) == [name]


def test_changed_variables_are_a_warning(container: Start) -> None:
    """A restore with other variables goes on, and says which."""
    (warning,) = compatibility.check(manifest(environment=("GONE",)), container({}), allow=())
    assert "GONE" in warning


# --- files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "build_id", "words"),
    [
        (3, None, None),
        (4, None, "has 3 bytes, not 4"),
        (3, "ab12", "has build id none, not ab12"),
        (4, "ab12", "has build id none, not ab12"),
    ],
)
def test_difference(tmp_path: Path, size: int, build_id: str | None, words: str | None) -> None:
    """A file differs by its build id, where one was recorded, and else by its size."""
    (tmp_path / "lib").write_bytes(b"123")
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    found = compatibility._difference(fd, OpenFile(path="/lib", mount="/", size=size, build_id=build_id))
    os.close(fd)
    assert found == (words and f"/lib {words}")


def test_missing(tmp_path: Path) -> None:
    """A file that is not there, or is a directory now, is missing."""
    (tmp_path / "lib").mkdir()
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    for path in ("/lib", "/none"):
        found = compatibility._difference(fd, OpenFile(path=path, mount="/", size=3, build_id=None))
        assert found == f"{path} is missing here"
    os.close(fd)


@pytest.mark.parametrize(("count", "more"), [(1, False), (5, False), (6, True)])
def test_lists_are_short(count: int, more: bool) -> None:
    """Of many differences five are named, and how many more there are."""
    text = compatibility._listed([f"file {number}" for number in range(count)])
    assert text is not None
    assert (" and 1 more." in text) is more
    assert text.count("file ") == min(count, 5)
    assert compatibility._listed([]) is None


# --- reasons ----------------------------------------------------------------------------------------


def file(mount: str) -> OpenFile:
    """Return a file that is nowhere."""
    return OpenFile(path="/no/such/file", mount=mount, size=1, build_id=None)


@pytest.mark.parametrize(
    ("reason", "other", "words"),
    [
        (Reason.ARCH_MISMATCH, {"architecture": "riscv64"}, "taken on riscv64"),
        (Reason.CPU_MISMATCH, {"cpu_features": ("sse2", "zzz_new")}, "lacks zzz_new."),
        (Reason.IMAGE_MISMATCH, {"files": (file("/"),)}, "/no/such/file is missing here."),
        (Reason.MOUNT_MISSING, {"files": (file("/models"),)}, "/no/such/file is missing here."),
    ],
)
def test_reasons(container: Start, reason: Reason, other: dict[str, Any], words: str) -> None:
    """A difference is refused with its reason; where that is allowed, it becomes a warning with the same words."""
    here = container({})
    with pytest.raises(Refused) as caught:
        compatibility.check(manifest(**other), here, allow=())
    assert caught.value.reason is reason
    assert words in str(caught.value)
    (warning,) = compatibility.check(manifest(**other), here, allow={reason})
    assert words in warning
    assert reason.code in warning


def test_what_fits(container: Start) -> None:
    """A checkpoint that fits has no warnings."""
    assert compatibility.check(manifest(), container({}), allow=()) == []


def test_an_application_that_is_gone() -> None:
    """Where the container's first process is no more, the check says so."""
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(pid, 0)
    with pytest.raises(Refused) as caught:
        compatibility.changed_variables(manifest(), Container(HostPid(pid)))
    assert caught.value.reason is Reason.APP_NOT_FOUND
