"""``chrek install``: the bundle copied to where an unmodified image can use it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner

from chrek.cli.install import command, install
from chrek.errors import Reason, UsageError


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Something with the shape of /opt/chrek: a program that names its loader, a library, a script, CRIU."""
    home = tmp_path / "bundle"
    for folder in ("bin", "lib/chrek", "lib/site-packages/kubernetes", "criu"):
        (home / folder).mkdir(parents=True)
    program = home / "bin/python3"
    program.write_bytes(b"\x7fELF....\0/opt/chrek/lib/native/ld.so\0rest\0/opt/chrek/lib/native\0end\0/opt/other\0")
    program.chmod(0o755)
    (home / "bin/sh").symlink_to("busybox")
    (home / "lib/chrek/module.py").write_text("path = '/opt/chrek/lib'\n")
    (home / "criu/criu").write_bytes(b"\x7fELF no path at all")
    return home


def test_programs_belong_to_their_new_place(bundle: Path, tmp_path: Path) -> None:
    """Paths in programs are rewritten without moving anything; texts, links and modes stay."""
    target = tmp_path / "t"
    install(bundle, target, home=Path("/chrek"))
    data = (target / "bin/python3").read_bytes()
    zeros = bytes(len("/opt"))
    loader, library = b"/chrek/lib/native/ld.so" + zeros, b"/chrek/lib/native" + zeros
    assert data == b"\x7fELF....\0" + loader + b"\0rest\0" + library + b"\0end\0/opt/other\0"
    assert stat.S_IMODE((target / "bin/python3").stat().st_mode) == 0o755
    assert os.readlink(target / "bin/sh") == "busybox"
    assert (target / "lib/chrek/module.py").read_text() == "path = '/opt/chrek/lib'\n"
    assert (target / "criu/criu").read_bytes() == b"\x7fELF no path at all"


def test_launcher_runs_from_its_new_place(bundle: Path, tmp_path: Path) -> None:
    """The entrypoint names the interpreter and the modules of the new place; the agent's own packages stay behind."""
    target = tmp_path / "t"
    install(bundle, target)
    launcher = target / "bin/restore-entrypoint"
    assert launcher.read_text().startswith(f"#!{target}/bin/python3 -IS\n")
    assert f'"{target}/lib"' in launcher.read_text()
    assert os.access(launcher, os.X_OK)
    assert not (target / "lib/site-packages").exists()
    install(bundle, target)  # an init container that runs again


@pytest.mark.parametrize("directory", ["chrek", "/longer/than/opt"])
def test_place_must_fit(bundle: Path, directory: str) -> None:
    """A path that is relative, or longer than /opt/chrek, is refused before anything is copied."""
    result = CliRunner().invoke(command, [directory, "--source", str(bundle)])
    assert isinstance(result.exception, UsageError)
    assert result.exception.reason is Reason.BAD_VALUE
