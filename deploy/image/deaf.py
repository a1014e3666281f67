"""Make the bundle's loader and C library deaf to a container's environment.

The init runs in the application's environment and hands it on untouched, so it cannot be started with a clean one.
What the variables name is meant for the application and built for its C library: loaded into the bundle's Python, it
would end the container before it began, or run where it has no business. Traced before this was done: LD_PRELOAD and
LD_AUDIT were loaded, LD_DEBUG and LD_PROFILE wrote files, LOCPATH was read, GCONV_PATH would have been for a character
set other than UTF-8. LD_LIBRARY_PATH (the bundle has an RPATH) and PYTHON* (``python3 -I``) did nothing.

Only constants are changed. Where they do not stand as expected, in a newer C library, the build fails and says so.
"""

# ruff: noqa: INP001 - for the program beside it

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

PRELOAD = b"/etc/ld.so.preload"
# How the loader tells its variables from others (_dl_next_ld_env_entry of glibc): 'L', 'D' and '_' are compared one by one.
ASKS_FOR_LD = re.compile(rb"(\x80[\x38-\x3f])L(\x75.\x80[\x78-\x7f]\x01D\x75.\x80[\x78-\x7f]\x02_)", re.DOTALL)
VARIABLES = (b"GCONV_PATH", b"LOCPATH")
# Converters are code, locales data, and both of the image's own C library, older or newer.
FOLDERS = re.compile(rb"(?<=\0)(/usr/lib/locale|/usr/lib/[a-z0-9_]+-linux-gnu/gconv|/usr/share/locale)(?=[/\0])")


def loader(data: bytes) -> bytes:
    """Return the loader without /etc/ld.so.preload and without LD_ variables."""
    if data.count(PRELOAD) != 1:
        sys.exit(f"bundle: {PRELOAD.decode()} stands {data.count(PRELOAD)} times in the loader, not once")
    return without_variables(data.replace(PRELOAD, bytes(len(PRELOAD))))


def without_variables(data: bytes) -> bytes:
    """Return the loader without LD_ variables: no name begins with the byte it then asks for."""
    changed, count = ASKS_FOR_LD.subn(rb"\1" + b"\xff" + rb"\2", data)
    if count != 1:
        sys.exit(f"bundle: the loader asks for its variables in {count} places, not in one")
    return changed


def library(data: bytes) -> bytes:
    """Return the C library without locales and converters from files; Python then works in UTF-8 (PEP 540)."""
    for name in VARIABLES:
        if data.count(b"\0" + name + b"\0") != 1:
            sys.exit(f"bundle: {name.decode()} is not a variable of the C library")
        data = data.replace(b"\0" + name + b"\0", b"\0\0" + name[1:] + b"\0")  # no variable has an empty name
    changed, count = FOLDERS.subn(lambda match: b"/dev/null".ljust(len(match[0]), b"/"), data)
    if not count:
        sys.exit("bundle: the C library names none of its folders")
    return changed


def try_out(python: Path) -> None:
    """Start the bundle's Python with hostile variables; fails unless it says what it should and nothing else."""
    with tempfile.TemporaryDirectory() as scratch:
        evil = Path(scratch, "evil.so")
        evil.write_bytes(b"no library: the loader would say so")
        named = dict.fromkeys(("LD_PRELOAD", "LD_AUDIT"), str(evil))
        hostile = {**named, "LD_SHOW_AUXV": "1", "LD_DEBUG": "all", "LD_LIBRARY_PATH": scratch, "LC_ALL": "C"}
        words = [str(python), "-IS", "-c", "print('\u00e4\u20ac')"]
        done = subprocess.run(words, env=hostile, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if (done.returncode, done.stdout, done.stderr) != (0, "\u00e4\u20ac\n", ""):
        sys.exit(f"bundle: its Python listens to the environment: {done.stdout[:500]}{done.stderr[:500]}")
