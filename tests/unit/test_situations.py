"""The table of situations, and the part of the troubleshooting page that is written from it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from chrek.errors import Reason
from cluster.situations import ALL, HERE, Situation, commands_of

REPO = Path(__file__).resolve().parents[2]
TROUBLESHOOTING = (REPO / "docs/troubleshooting.md").read_text()
ELSEWHERE = [row for row in ALL if row.where != HERE]


def test_the_page_is_generated() -> None:
    """docs/troubleshooting.md has what tools/gen-situations writes from the table."""
    argv = [sys.executable, str(REPO / "tools/gen-situations"), "--check"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_command_of_the_page_is_typed_by_a_test() -> None:
    """Each kubectl command on the troubleshooting page is one of a row, which the cluster tests type."""
    typed = {command.run for row in ALL for command in commands_of(row)}
    page = TROUBLESHOOTING.replace("\\|", "|")
    printed = {*re.findall(r"^\$ (kubectl .*)$", page, re.MULTILINE), *re.findall(r"`(kubectl [^`]*)`", page)}
    printed.discard("kubectl config set-context --current --namespace NAMESPACE")
    printed.discard("kubectl exec")
    assert printed <= typed, printed - typed


def test_rows_are_told_apart() -> None:
    """Every row has a pod name of its own, and a code that exists."""
    assert not [name for name, count in Counter(row.name for row in ALL).items() if count > 1]
    codes = {code for row in ALL for code in (row.code, row.next_pod.partition("/")[2]) if code}
    assert codes <= set(Reason.__members__)


@pytest.mark.parametrize("row", ELSEWHERE, ids=lambda row: row.name)
def test_rows_are_asserted_somewhere(row: Situation) -> None:
    """A row that the common tests do not make names a module, or a test beside them, that makes it."""
    folder = REPO / "tests/cluster"
    assert (folder / row.where).is_file() or f"def {row.where}(" in (folder / HERE).read_text()
