"""What variables of the workload's environment do to the programs that start it: nothing; and it finds all of them."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from containers import Container, Mount, needs
from containers.layout import REPO
from containers.spec import Json

pytestmark = needs("containers", "criu", "busybox")

IMAGE = REPO / "deploy/image"
VARIABLES = [
    *("spring.datasource.url=jdbc", "discovery-type=single", "PS1=x", "IFS=,", "OPTIND=7", "PWD=/elsewhere", "SHLVL=5"),
    *("LD_LIBRARY_PATH=/nowhere", "PYTHONPATH=/nowhere", "PYTHONHOME=/nowhere", "GCONV_PATH=/nowhere", "ENV=/etc/profile"),
    *("TWO=lines\nof it", "EMPTY=", "LC_ALL=xx_XX.ISO-8859-1"),
]


def shell_mounts() -> list[Mount]:
    """Return what a checkpoint-enabled image has beside the init: the entrypoint, and the shell that runs it."""
    busybox = shutil.which("busybox")
    assert busybox is not None
    targets = ("/opt/chrek/bin/sh", "/opt/chrek/bin/busybox")
    entrypoint = Mount.bind(IMAGE / "smart-entrypoint.sh", "/usr/local/bin/smart-entrypoint.sh", read_only=True)
    return [entrypoint, *(Mount.bind(busybox, target, read_only=True) for target in targets)]


@pytest.mark.parametrize("size", [0, 1000])
def test_environment_through_the_shell(container: Callable[..., Container], size: int) -> None:
    """The application finds its environment byte by byte as the runtime gave it, however large, through shell and init."""
    expected: list[str] = []

    def edit(spec: Json) -> None:
        spec["process"]["env"] += [*VARIABLES, *(f"LONG_{number}={'x' * 100}" for number in range(size))]
        expected.extend(spec["process"]["env"])

    shown = container(["/usr/local/bin/smart-entrypoint.sh", "/usr/bin/env", "-0"], mounts=shell_mounts(), edit=edit)
    assert shown.wait() == 0
    text = "\0".join([*expected, ""])
    shown.until(lambda: len(shown.log) >= len(text), what="the environment")
    assert shown.log == text


def test_no_descriptor_is_left(container: Callable[..., Container]) -> None:
    """What the shell handed on to the init is not open in the application."""
    listing = ["/bin/ls", "-l", "/proc/self/fd"]
    plain = container(["/usr/local/bin/restore-entrypoint", "--", *listing])
    through = container(["/usr/local/bin/smart-entrypoint.sh", *listing], mounts=shell_mounts())
    assert (plain.wait(), through.wait()) == (0, 0)
    for shown in (plain, through):
        shown.wait_for("3 -> /proc/")
    assert len(plain.log.splitlines()) == len(through.log.splitlines())


def deaf() -> ModuleType:
    """Return the module that makes the bundle's loader."""
    spec = importlib.util.spec_from_file_location("deaf", IMAGE / "deaf.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(loader: Path, bundle: Path, library: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Start the bundle's CRIU through a loader, with variables."""
    path = f"{library}:{bundle / 'lib'}"
    words = [str(loader), "--inhibit-cache", "--library-path", path, str(bundle / "criu"), "--version"]
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)


def test_loader_that_is_deaf(criu_bundle: Path, tmp_path: Path) -> None:
    """The loader of the image's suite, as the image has it, loads and writes nothing that LD_ variables name."""
    evil = tmp_path / "evil.so"
    evil.write_bytes(b"no library")
    hostile = {"LD_PRELOAD": str(evil), "LD_AUDIT": str(evil), "LD_DEBUG": "files", "LD_SHOW_AUXV": "1"}
    assert str(evil) in run(criu_bundle / "ld.so", criu_bundle, tmp_path, **hostile).stderr
    made = tmp_path / "ld.so"
    made.write_bytes(deaf().without_variables((criu_bundle / "ld.so").read_bytes()))
    made.chmod(0o755)
    done = run(made, criu_bundle, tmp_path, **hostile)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == run(criu_bundle / "ld.so", criu_bundle, tmp_path).stdout


def test_library_that_is_deaf(criu_bundle: Path, tmp_path: Path) -> None:
    """The C library of the image's suite, as the image has it, names no folder of locales or converters, and works."""
    made = deaf().library((criu_bundle / "lib/libc.so.6").read_bytes())
    assert len(made) == os.path.getsize(criu_bundle / "lib/libc.so.6")
    for name in (b"\0GCONV_PATH\0", b"\0LOCPATH\0", b"\0/usr/lib/locale", b"-linux-gnu/gconv"):
        assert name not in made
    (tmp_path / "libc.so.6").write_bytes(made)
    assert run(criu_bundle / "ld.so", criu_bundle, tmp_path, LC_ALL="C.UTF-8").returncode == 0


@pytest.mark.parametrize("change", ["loader", "library"])
def test_what_is_not_as_expected(criu_bundle: Path, change: str) -> None:
    """A loader or library of another make fails the build with words instead of being left as it is."""
    with pytest.raises(SystemExit, match="bundle: "):
        getattr(deaf(), change)((criu_bundle / "criu").read_bytes())
