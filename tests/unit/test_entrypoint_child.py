"""Finding a program along PATH, and the raw environment."""

from __future__ import annotations

import pytest

from chrek.entrypoint.child import DEFAULT_PATH, candidates
from chrek.entrypoint.inherited import Inherited
from chrek.entrypoint.supervise import exit_code


@pytest.mark.parametrize(
    ("program", "path", "files"),
    [
        (b"run", b"/a:/b", [b"/a/run", b"/b/run"]),
        (b"run", b"", [b"./run"]),
        (b"run", b"/a::/b:", [b"/a/run", b"./run", b"/b/run", b"./run"]),
        (b"./run", b"/a", [b"./run"]),
        (b"dir/run", None, [b"dir/run"]),
        (b"/abs/run", b"/a", [b"/abs/run"]),
        (b"", b"/a", [b""]),
        (b"r\xffn", b"/\xfe", [b"/\xfe/r\xffn"]),
    ],
)
def test_files_to_try(program: bytes, path: bytes | None, files: list[bytes]) -> None:
    """PATH is searched as execvp(3) does: an empty element is the working directory, a slash means no search."""
    assert candidates(program, path) == files


def test_no_path_is_the_runtime_s_default() -> None:
    """Without PATH the directories that runtimes assume are searched."""
    assert len(candidates(b"run", None)) == len(DEFAULT_PATH.split(b":"))


def test_the_first_of_two_equal_names_counts() -> None:
    """Duplicates and bytes that are no UTF-8 are kept; getenv(3)'s choice is ours."""
    entries = (b"A=1", b"A=2", b"B=\xff", b"odd", b"C==")
    given = Inherited(blocked=0, ignored=0, capabilities=0, environ=entries, has_stderr=True)
    assert given.variable(b"A") == b"1"
    assert given.variable(b"D") is None
    assert given.mapping() == {"A": "1", "B": "\udcff", "C": "="}


@pytest.mark.parametrize(("status", "code"), [(0, 0), (7 << 8, 7), (255 << 8, 255), (9, 137), (15 | 0x80, 143)])
def test_exit_codes(status: int, code: int) -> None:
    """A wait status becomes the application's code, or 128 plus its signal."""
    assert exit_code(status) == code
