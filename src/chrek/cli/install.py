"""``chrek install DIRECTORY``: the bundle copied to where an unmodified image can use it.

An init container from the agent's image runs this into an emptyDir; the application's container mounts that at the
same path and has its command prefixed with ``DIRECTORY/bin/restore-entrypoint --``. The bundle's programs name
their loader and libraries by absolute paths below ``/opt/chrek``; those are rewritten in place, so the new
path may not be longer.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import click

from chrek.cli import options, output
from chrek.errors import ChrekError, Reason, UsageError

HOME = Path("/opt/chrek")
LAUNCHER = """\
#!{home}/bin/python3 -IS
# The first process of a container: see chrek.entrypoint.
import sys

sys.path.insert(0, "{home}/lib")
import chrek.entrypoint.__main__
"""
_LEFT_OUT = ("site-packages", "__pycache__.tmp")


@click.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.option("--source", default=HOME, hidden=True, type=click.Path(path_type=Path, exists=True))
@options.json_option
def command(*, directory: Path, source: Path, as_json: bool) -> None:
    """Copy ChReK's init, its Python and CRIU into DIRECTORY, for containers of unmodified images.

    DIRECTORY is the path at which those containers mount it, /chrek for instance.
    """
    if not directory.is_absolute() or len(str(directory)) > len(str(HOME)):
        message = f"{directory} is not an absolute path of at most {len(str(HOME))} characters."
        raise UsageError(Reason.BAD_VALUE, message, cure="Use /chrek, and mount the volume there in both containers.")
    try:
        install(source, directory)
    except (OSError, shutil.Error) as error:
        message = f"The bundle cannot be copied to {directory}: {error}."
        raise ChrekError(
            Reason.WRITE_FAILED, message, cure="Mount an emptyDir there that this user can write."
        ) from error
    prefix = [f"{directory}/bin/restore-entrypoint", "--"]
    if as_json:
        output.emit({"directory": str(directory), "prefix": prefix})
    else:
        click.echo(f"installed in {directory}; prefix the command with: {' '.join(prefix)}")


def install(source: Path, target: Path, *, home: Path | None = None) -> None:
    """Copy the bundle and make it belong to its new place; *home* is that place's name where it is another one.

    Raises:
        OSError: it cannot be read or written.
    """
    for name in ("bin", "lib", "criu", "licenses"):
        if (source / name).exists():
            # An init container may run again in the same volume.
            shutil.rmtree(target / name, ignore_errors=True)
            _copy(source / name, target / name, home or target)
    launcher = target / "bin/restore-entrypoint"
    launcher.write_text(LAUNCHER.format(home=home or target))
    launcher.chmod(0o755)


def _copy(source: Path, target: Path, home: Path) -> None:
    def copy(here: str, there: str) -> str:
        shutil.copyfile(here, there)
        shutil.copymode(here, there)
        _move_paths(there, home)
        return there

    # Modes, not owners: the init container need not be root.
    shutil.copytree(source, target, symlinks=True, copy_function=copy, ignore=shutil.ignore_patterns(*_LEFT_OUT))


def _move_paths(file: str, home: Path) -> None:
    """Rewrite the paths below /opt/chrek in a program or library; a shorter one is followed by zeros."""
    with open(file, "rb") as reader:
        if reader.read(4) != b"\x7fELF":
            return
        data = b"\x7fELF" + reader.read()
    old, new = os.fsencode(HOME) + b"/", os.fsencode(home) + b"/"
    pieces, at = [], 0
    while (found := data.find(old, at)) >= 0:
        end = data.index(b"\0", found)
        moved = data[found:end].replace(old, new)
        pieces += [data[at:found], moved.ljust(end - found, b"\0")]
        at = end
    if pieces:
        with open(file, "r+b") as writer:
            writer.write(b"".join(pieces) + data[at:])
