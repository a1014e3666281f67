"""A process whose memory the tests move: it runs lines of Python on request and answers with their value.

Started as a program it is the process; imported it gives `Child`, the handle on one. Mappings are made at
fixed addresses, so that a second process can have the same ones and be filled.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import mmap
import os
import random
import signal
import subprocess
import sys
from types import TracebackType
from typing import Any, Self

BASE = 0x2000_0000_0000
PAGE = 4096
NONE, READ, WRITE, EXEC = 0, 1, 2, 4
RW = READ | WRITE
FIXED_NOREPLACE = 0x100000

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
for _name in ("mprotect", "madvise"):
    getattr(libc, _name).argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
for _name in ("mlock", "munmap"):
    getattr(libc, _name).argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def check(result: int) -> None:
    """Raise OSError for a failed call."""
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def anon(address: int, size: int, *, protection: int = RW, fd: int = -1) -> None:
    """Map private memory, anonymous or of a file, at a fixed address."""
    flags = mmap.MAP_PRIVATE | FIXED_NOREPLACE | (mmap.MAP_ANONYMOUS if fd < 0 else 0)
    if libc.mmap(address, size, protection, flags, fd, 0) != address:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def protect(address: int, size: int, protection: int) -> None:
    """mprotect(2)."""
    check(libc.mprotect(address, size, protection))


def randomise(address: int, size: int, seed: int) -> None:
    """Fill memory with bytes that *seed* gives."""
    put(address, random.Random(seed).randbytes(size))


def put(address: int, data: bytes) -> None:
    """Write bytes to memory."""
    ctypes.memmove(address, data, len(data))


def get(address: int, size: int) -> bytes:
    """Read bytes from memory."""
    return ctypes.string_at(address, size)


def sha(address: int, size: int) -> str:
    """Digest memory."""
    return hashlib.sha256((ctypes.c_char * size).from_address(address)).hexdigest()


def fork_child(body: str) -> int:
    """Fork a process that runs *body* and then waits to be killed; return once it has run it."""
    ready, done = os.pipe()
    pid = os.fork()
    if pid == 0:
        exec(body, globals())
        os.write(done, b"x")
        while True:
            signal.pause()
    os.read(ready, 1)
    return pid


class Child:
    """A running process of this program."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-I", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def __call__(self, code: str) -> Any:  # noqa: ANN401  whatever the code gives
        """Run statements; the value of the last line, an expression, comes back."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(code) + "\n")
        answer = json.loads(self.process.stdout.readline())
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["value"]

    def kill(self) -> None:
        """Kill it and wait until it is gone."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.kill()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def serve() -> None:
    """Answer requests until the input ends."""
    for line in sys.stdin:
        lines = json.loads(line).strip().splitlines()
        try:
            exec("\n".join(lines[:-1]), globals())
            try:
                value = eval(lines[-1], globals())
            except SyntaxError:
                exec(lines[-1], globals())
                value = None
            answer = {"value": value}
        except Exception as error:  # noqa: BLE001
            answer = {"error": repr(error)}
        print(json.dumps(answer), flush=True)  # noqa: T201


if __name__ == "__main__":
    serve()
