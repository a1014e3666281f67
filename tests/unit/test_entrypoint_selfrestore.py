"""Knobs of a restore from inside that cannot act are refused with the reason."""

from __future__ import annotations

import pytest

from chrek.entrypoint.environment import parse
from chrek.entrypoint.selfrestore import refuse_knobs
from chrek.errors import Reason, Refused

POD = {"DYN_CHECKPOINT_HASH": "one"}


@pytest.mark.parametrize("name", ["CRIU_LAZY_PAGES", "CRIU_AUTO_DEDUP"])
def test_what_needs_classic_images(name: str) -> None:
    """The message names the variable, and the cure a way to what was wanted."""
    with pytest.raises(Refused) as caught:
        refuse_knobs(parse({**POD, name: "true"}).criu)
    assert caught.value.reason is Reason.KNOB_REFUSED
    assert name in caught.value.message
    assert "chrek export" in caught.value.cure


@pytest.mark.parametrize("name", ["CRIU_LAZY_PAGES", "CRIU_AUTO_DEDUP", "CRIU_SKIP_IN_FLIGHT"])
def test_what_is_off_or_has_nothing_to_do(name: str) -> None:
    """A knob that is off is no reason, nor is one for connections that no checkpoint has."""
    refuse_knobs(parse({**POD, name: "off"}).criu)
    refuse_knobs(parse({**POD, "CRIU_SKIP_IN_FLIGHT": "1"}).criu)
