"""`chrek doctor`: on this machine, and where something is missing."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from chrekcli import CHREK, chrek, chrek_json
from containers import needs

pytestmark = needs("root", "criu")


def levels(findings: list[dict[str, str]]) -> dict[str, str]:
    """Return the worst level of each name."""
    order = ["ok", "warning", "missing"]
    found: dict[str, str] = {}
    for finding in findings:
        found[finding["name"]] = max(found.get(finding["name"], "ok"), finding["level"], key=order.index)
    return found


def test_this_machine_has_what_is_required(tmp_path: Path) -> None:
    """Where the other system tests run, nothing is missing; every line is ok or has a cure."""
    found = chrek_json("doctor", store=tmp_path)
    assert found["ok"]
    assert all(finding["level"] == "ok" or finding["cure"] for finding in found["findings"])
    names = levels(found["findings"])
    assert {"machine", "kernel", "root", "capabilities", "CRIU", "CRIU's own check", "open files", "store"} <= set(
        names
    )


def test_without_criu(tmp_path: Path) -> None:
    """A missing bundle is a missing line with the cure, and the exit code is 1."""
    done = chrek("doctor", "--store", tmp_path, env={"CHREK_CRIU_BUNDLE": str(tmp_path / "none")})
    assert done.returncode == 1
    assert "missing CRIU: no CRIU bundle at" in done.stdout
    assert "make setup" in done.stdout


def test_as_a_user(tmp_path: Path) -> None:
    """Without root the required rights are missing by name; the rest is looked at all the same."""
    tmp_path.chmod(0o755)
    command = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", *CHREK, "doctor", "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "CHREK_STORE": str(tmp_path)}
    )
    if not done.stdout:
        pytest.skip("the virtual environment lies where only root can read")
    names = levels(json.loads(done.stdout)["findings"])
    assert done.returncode == 1
    assert names["root"] == names["capabilities"] == names["store"] == "missing"
    assert names["/proc"] == "ok"


def test_without_capabilities(tmp_path: Path) -> None:
    """Missing capabilities are listed by name."""
    command = ["setpriv", "--bounding-set", "-sys_admin,-sys_ptrace", "--inh-caps", "-all", *CHREK, "doctor"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "CHREK_STORE": str(tmp_path)}
    )
    assert done.returncode == 1
    assert "lacking CAP_SYS_PTRACE, CAP_SYS_ADMIN" in done.stdout


def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    """A read-only store is missing."""
    place = tmp_path / "read-only"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", str(place)], check=True)
    try:
        done = chrek("doctor", "--store", place)
    finally:
        subprocess.run(["umount", str(place)], check=True)
    assert done.returncode == 1
    assert f"missing store: {place} cannot be written" in done.stdout
