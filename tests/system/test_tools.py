"""What the set-up leaves: the CRIU bundle, and tools that do nothing when nothing is to do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from containers import bundle, needs
from containers.layout import base_root

pytestmark = needs("criu")

REPO = Path(__file__).resolve().parents[2]


def listed() -> dict[str, str]:
    """Return the libraries that the bundle's loader finds for CRIU: name and path."""
    place = bundle()
    argv = [f"{place}/ld.so", "--inhibit-cache", "--library-path", f"{place}/lib", "--list", f"{place}/criu"]
    text = subprocess.run(argv, check=True, capture_output=True, text=True, env={}).stdout
    return {line.split()[0]: line.split()[2] for line in text.splitlines() if " => " in line}


def test_every_library_is_the_bundles_own() -> None:
    """CRIU's libraries all come from the bundle, and none of the machine's own is used."""
    found = listed()
    assert len(found) > 10
    for name, path in found.items():
        assert path.startswith(f"{bundle()}/"), f"{name} => {path}"


def test_the_loader_reads_no_preload_file() -> None:
    """The bundle's loader has no path of a file with libraries to load first, which a container could plant."""
    assert b"/etc/ld.so.preload" not in (bundle() / "ld.so").read_bytes()


def test_a_planted_preload_file_is_not_opened(tmp_path: Path) -> None:
    """A trace of the start shows no open of anything outside the bundle but the kernel's own files."""
    place = bundle()
    trace = tmp_path / "trace"
    argv = ["strace", "-f", "-e", "trace=open,openat,access,execve,readlink", "-o", str(trace)]
    loader = [f"{place}/ld.so", "--inhibit-cache", "--library-path", f"{place}/lib", f"{place}/criu", "--version"]
    subprocess.run([*argv, *loader], check=True, capture_output=True)
    opened = [line.split('"')[1] for line in trace.read_text().splitlines() if '"' in line and "ENOENT" not in line]
    assert opened
    assert [path for path in opened if not path.startswith((str(place), "/proc/", "/sys/", "/dev/null"))] == []


def test_the_bundle_says_what_it_is() -> None:
    """bundle.json names the suite and the versions, and CRIU is new enough for current kernels."""
    facts = json.loads((bundle() / "bundle.json").read_text())
    assert tuple(int(number) for number in facts["criu"].split(".")) >= (4, 1, 1)
    assert facts["packages"]["criu"].startswith(facts["criu"].removesuffix(".0"))
    assert facts["suite"]


@pytest.mark.parametrize(("tool", "made"), [("setup-criu", bundle), ("setup-base", base_root)])
def test_a_second_run_does_nothing(tool: str, made: Callable[[], Path]) -> None:
    """A tool that finds its work done leaves it as it is and fetches nothing: it runs without any network."""
    before = made().stat()
    # CRIU's own check connects over the loopback interface.
    argv = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", sys.executable, str(REPO / "tools" / tool)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "ready in" in done.stdout
    assert "downloading" not in done.stdout
    after = made().stat()
    assert (after.st_ino, after.st_ctime_ns) == (before.st_ino, before.st_ctime_ns)
