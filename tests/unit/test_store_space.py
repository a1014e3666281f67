"""Space is computed before anything is written."""

from __future__ import annotations

import errno
import os
import resource
from typing import TYPE_CHECKING

import pytest

from chrek.errors import Reason, Refused
from chrek.store import Staging, Store, free_bytes, require_space, write_failed

if TYPE_CHECKING:
    from pathlib import Path


def test_what_does_not_fit_is_refused_with_the_numbers(tmp_path: Path) -> None:
    """The message says what is needed, what is there and what is lacking; nothing stays behind."""
    with Store.open(tmp_path) as store:
        need = free_bytes(store.fd) + (1 << 40)
        with pytest.raises(Refused) as caught:
            Staging.create(store, "abc", need=need)
        assert caught.value.reason is Reason.NO_SPACE
        assert str(need) in caught.value.message
        assert not os.path.exists(tmp_path / ".staging" / "abc")
        Staging.create(store, "abc", need=1 << 20).discard()


def test_a_limit_on_file_size_counts(tmp_path: Path) -> None:
    """RLIMIT_FSIZE would end the process with SIGXFSZ in the middle of a shard."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with Store.open(tmp_path) as store:
            require_space(store.fd, 1 << 21, largest_file=1 << 20)
            with pytest.raises(Refused, match="at most 1048576") as caught:
                require_space(store.fd, 1 << 21, largest_file=(1 << 20) + 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.reason is Reason.NO_SPACE


@pytest.mark.parametrize(
    ("number", "reason"),
    [(errno.ENOSPC, Reason.NO_SPACE), (errno.EDQUOT, Reason.NO_SPACE), (errno.EIO, Reason.WRITE_FAILED)],
)
def test_errors_of_the_file_system_become_reasons(number: int, reason: Reason) -> None:
    """A full disk and a full quota are told apart from a broken disk."""
    assert write_failed(OSError(number, os.strerror(number)), "x").reason is reason
