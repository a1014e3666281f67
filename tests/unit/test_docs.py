"""The documents keep up with the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from chrek.errors import ExitCode, Reason

REPO = Path(__file__).resolve().parents[2]
TROUBLESHOOTING = (REPO / "docs/troubleshooting.md").read_text()
PAGES = [*REPO.glob("*.md"), *(REPO / "docs").glob("*.md"), *REPO.glob("examples/**/*.md")]
LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_the_table_of_reasons_is_generated() -> None:
    """docs/reasons.md is what tools/gen-reasons writes from the code."""
    argv = [sys.executable, str(REPO / "tools/gen-reasons"), "--check"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("reason", Reason, ids=lambda reason: reason.name)
def test_every_reason_has_its_section(reason: Reason) -> None:
    """The troubleshooting page has a section of its own for every reason code."""
    assert f"\n### {reason.code}\n" in TROUBLESHOOTING


def test_no_section_of_a_code_that_does_not_exist() -> None:
    """The troubleshooting page has no section for a code that nothing raises any more."""
    codes = set(re.findall(r"^### ([A-Z0-9_]+)$", TROUBLESHOOTING, flags=re.MULTILINE))
    assert codes <= {reason.code for reason in Reason}


def test_exit_codes_are_those_promised() -> None:
    """The exit codes are an interface: their numbers do not change."""
    assert [code.value for code in ExitCode] == [0, 1, 2, 170, 171, 172]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_links_lead_somewhere(page: Path) -> None:
    """Every link between the documents leads to a file and, where it names one, a heading that exist."""
    for target in LINK.findall(page.read_text()):
        if "://" in target or target.startswith("mailto:"):
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), f"{page.name}: {target}"
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there.read_text()), f"{page.name}: {target}"
