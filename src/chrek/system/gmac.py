"""GMAC (NIST SP 800-38D): the digest of bulk data, by libcrypto's own vector code.

SHA-256 costs 0.56 s of a core a GB with the processor's SHA instructions, GMAC 0.12 with its carry-less
multiplication (2-core EPYC, OpenSSL 3.0), and Python has no faster hash either: BLAKE2 0.9, CRC-32 0.4.
Key and nonce are constants, so it authenticates nothing: it is a polynomial over GF(2^128) that tells damaged
data from sound data, with one chance in 2^128 of not seeing a change that was not made on purpose.

The library is the one that Python's `hashlib` has loaded already, and is looked up when this module is imported:
later the process may stand in a container's mount namespace, where a file of that name is the container's.
"""

from __future__ import annotations

import ctypes
import hashlib  # noqa: F401 - loads libcrypto, which is then found without a file being looked for
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from chrek.errors import Reason, Refused

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

KEY: Final = b"ChReK block hash"
"""The AES-128 key. Its hash subkey and mask, for readers without AES, are in ``docs/format.md``."""

NONCE: Final = bytes(12)

SIZE: Final = 16
"""Bytes of a digest."""

_GET_TAG: Final = 0x10  # EVP_CTRL_AEAD_GET_TAG, openssl/evp.h
_PIECE: Final = 1 << 30  # lengths are C ints
_NAMES: Final = ("libcrypto.so.3", "libcrypto.so.1.1")


class _Library:
    """The calls of libcrypto that are used (EVP_EncryptInit(3))."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, integer = ctypes.c_void_p, ctypes.c_int
        self.new = _typed(library.EVP_CIPHER_CTX_new, pointer)
        self.free = _typed(library.EVP_CIPHER_CTX_free, None, pointer)
        self.cipher = _typed(library.EVP_aes_128_gcm, pointer)
        self.init = _typed(library.EVP_EncryptInit_ex, integer, *[pointer] * 5)
        self.update = _typed(library.EVP_EncryptUpdate, integer, *[pointer] * 4, integer)
        self.final = _typed(library.EVP_EncryptFinal_ex, integer, *[pointer] * 3)
        self.control = _typed(library.EVP_CIPHER_CTX_ctrl, integer, pointer, integer, integer, pointer)


def _typed(function: ctypes._NamedFuncPointer, result: type | None, *arguments: type) -> ctypes._NamedFuncPointer:
    function.restype, function.argtypes = result, arguments
    return function


def _load() -> _Library | None:
    for name in _NAMES:
        with suppress(OSError, AttributeError):
            return _Library(ctypes.CDLL(name))
    return None


_library: Final = _load()


def available() -> bool:
    """Whether this Python has a libcrypto to compute it with."""
    return _library is not None


class Gmac:
    """A digest that is being computed; like an object of `hashlib`, but nothing can follow `digest`.

    Raises:
        Refused: ``NOT_SUPPORTED_HERE``; there is no libcrypto.
    """

    def __init__(self) -> None:
        self._context: int | None = None
        if _library is None:
            text = f"Block digests of this kind need {_NAMES[0]}, and Python {sys.executable!r} finds none."
            raise Refused(Reason.NOT_SUPPORTED_HERE, text, cure="Install OpenSSL's library (Debian: libssl3).")
        self._calls = _library
        self._context = self._calls.new()
        self._written = ctypes.c_int()
        _check(self._calls.init(self._context, self._calls.cipher(), None, KEY, NONCE))

    def __del__(self) -> None:
        if self._context is not None:
            self._calls.free(self._context)

    def update(self, buffer: ReadableBuffer) -> None:
        """Append *buffer*; the interpreter's lock is free meanwhile."""
        with memoryview(buffer) as whole, whole.cast("B") as view:
            if view.readonly:
                self._update(bytes(view), view.nbytes)
                return
            for start in range(0, view.nbytes, _PIECE):
                with view[start : start + _PIECE] as piece:
                    self._update(ctypes.byref(ctypes.c_char.from_buffer(piece)), piece.nbytes)

    def _update(self, address: object, length: int) -> None:
        if length:
            _check(self._calls.update(self._context, None, ctypes.byref(self._written), address, length))

    def digest(self) -> bytes:
        """Return the digest of all that was appended."""
        tag = ctypes.create_string_buffer(SIZE)
        _check(self._calls.final(self._context, tag, ctypes.byref(self._written)))
        _check(self._calls.control(self._context, _GET_TAG, SIZE, tag))
        return tag.raw


def _check(result: int) -> None:
    if result != 1:
        raise MemoryError("libcrypto could not compute a GMAC")
