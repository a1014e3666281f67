"""CRIU as ChReK carries it: a program, its own loader, and the libraries it needs.

The bundle is a directory::

    criu            the program, as its distribution built it
    ld.so           the loader of the same distribution
    lib/            every shared library of the program, and nothing else
    bundle.json     suite, packages and versions

It is run through its own loader by descriptors, so that it needs nothing from, and loads nothing of,
the file system it runs in. Path constants that would name files of the container are redirected when the
bundle is made: the loader's ``/etc/ld.so.preload``, CRIU's and its libraries' configuration and plugins, and
CRIU's cache of kernel features (see `chrek.criu.features`).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from chrek.errors import ChrekError, Reason

MINIMUM = (4, 1, 1)
"""Oldest CRIU whose restore works on current kernels (vDSO handling) and whose RPC has what is used here."""

STRICT_SOCKETS = (6, 16)
"""Since this Linux, SO_PASSCRED and SO_PASSSEC fail on sockets that are neither unix nor netlink; CRIU 4.2 knows."""

VARIABLE = "CHREK_CRIU_BUNDLE"


def _places() -> list[Path]:
    named = os.environ.get(VARIABLE)
    if named:
        return [Path(named)]
    return [Path(sys.prefix) / "share/chrek/criu", Path("/opt/chrek/criu")]


@dataclass(frozen=True)
class Bundle:
    """Where a bundle lies. `find` looks for one."""

    path: Path

    @classmethod
    def find(cls) -> Bundle:
        """Return the bundle: ``$CHREK_CRIU_BUNDLE``, else the installation's own, else ``/opt/chrek/criu``.

        Raises:
            ChrekError: ``CRIU_UNUSABLE``, when there is none.
        """
        places = _places()
        for place in places:
            if (place / "criu").is_file() and (place / "ld.so").is_file():
                return cls(place)
        looked = ", ".join(str(place) for place in places)
        raise ChrekError(Reason.CRIU_UNUSABLE, f"no CRIU bundle at {looked}.")

    def command(self, *arguments: str) -> list[str]:
        """Return the command line that runs CRIU right here, outside any container."""
        loader = [str(self.path / "ld.so"), "--inhibit-cache", "--library-path", str(self.path / "lib")]
        return [*loader, str(self.path / "criu"), "--no-default-config", *arguments]

    def version(self) -> tuple[int, ...]:
        """Return the program's version: what the bundle says of itself, else what the program says.

        Raises:
            ChrekError: ``CRIU_UNUSABLE``, when it does not run or is too old.
        """
        return self._version

    @cached_property
    def _version(self) -> tuple[int, ...]:
        # It was asked when the bundle was made; starting a program for it would lengthen every capture.
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            stated = json.loads((self.path / "bundle.json").read_bytes())["criu"]
            version = tuple(int(part) for part in stated.split("."))
            if version >= MINIMUM:
                return version
        return self.ask_version()

    def ask_version(self) -> tuple[int, ...]:
        """Ask the program for its version.

        Raises:
            ChrekError: ``CRIU_UNUSABLE``, when it does not run or is too old.
        """
        result = subprocess.run(self.command("--version"), capture_output=True, text=True, check=False)
        words = result.stdout.split()
        if result.returncode or len(words) < 2:
            raise ChrekError(Reason.CRIU_UNUSABLE, f"{self.path}/criu does not run: {result.stderr.strip()[-300:]}.")
        version = tuple(int(part) for part in words[1].split(".") if part.isdigit())
        if version < MINIMUM:
            raise ChrekError(Reason.CRIU_UNUSABLE, f"{self.path}/criu is {words[1]}, older than 4.1.1.")
        return version


    def require(self) -> None:
        """Check that this CRIU can work on this kernel.

        Raises:
            ChrekError: ``CRIU_UNUSABLE``.
        """
        kernel = tuple(int(part) for part in re.findall(r"\d+", os.uname().release)[:2])
        if kernel >= STRICT_SOCKETS and self.version() < (4, 2):
            message = f"{self.path}/criu is older than 4.2 and cannot dump TCP sockets on Linux {os.uname().release}."
            raise ChrekError(Reason.CRIU_UNUSABLE, message)


@dataclass(frozen=True)
class OpenBundle:
    """The bundle's files as descriptors, for running it where its paths do not exist."""

    loader: int
    libraries: int
    program: int
    empty: int

    @classmethod
    def open(cls, bundle: Bundle, empty: Path) -> OpenBundle:
        """Open the bundle; *empty* is an empty directory that stands in for PATH and CRIU's plugins."""
        directory = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        return cls(
            loader=os.open(bundle.path / "ld.so", os.O_RDONLY | os.O_CLOEXEC),
            libraries=os.open(bundle.path / "lib", directory),
            program=os.open(bundle.path / "criu", os.O_RDONLY | os.O_CLOEXEC),
            empty=os.open(empty, directory),
        )

    @property
    def descriptors(self) -> list[int]:
        """All of them, to be inherited."""
        return [self.loader, self.libraries, self.program, self.empty]

    def arguments(self, *options: str) -> list[str]:
        """Return CRIU's argument vector, the loader first."""
        loader = ["ld.so", "--inhibit-cache", "--library-path", f"/proc/self/fd/{self.libraries}"]
        return [*loader, f"/proc/self/fd/{self.program}", "--no-default-config", *options]

    def environment(self) -> dict[str, str]:
        """Return CRIU's whole environment: no PATH, no plugins, no HOME to read a configuration from."""
        return {"PATH": f"/proc/self/fd/{self.empty}", "CRIU_LIBS_DIR": f"/proc/self/fd/{self.empty}"}

    def close(self) -> None:
        """Close every descriptor."""
        for fd in self.descriptors:
            os.close(fd)
