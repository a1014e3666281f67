"""How often a container that restores itself lived for less than a minute."""

from __future__ import annotations

from pathlib import Path

import pytest

from chrek.entrypoint.lives import LIMIT, Lives
from chrekcli import until


def test_three_short_lives_and_the_next_is_given_up(tmp_path: Path) -> None:
    """Each start finds what the ones before have left; a cold one adds nothing."""
    place = str(tmp_path / "count")
    for number in range(LIMIT):
        lives = Lives(place=place)
        assert (lives.count, lives.given_up) == (number, False)
        lives.begin(restored=True)
    lives = Lives(place=place)
    assert lives.given_up
    lives.begin(restored=False)
    assert Lives(place=place).count == LIMIT


def test_damage_is_given_up_at_once(tmp_path: Path) -> None:
    """One start is enough where the application has found damage."""
    place = str(tmp_path / "count")
    lives = Lives(place=place)
    lives.begin(restored=True)
    lives.give_up()
    assert Lives(place=place).given_up


@pytest.mark.parametrize("restored", [True, False])
def test_a_long_life_is_a_new_beginning(tmp_path: Path, restored: bool) -> None:
    """A start that lives long enough, restored or cold, takes all that was counted back."""
    place = tmp_path / "count"
    for _ in range(LIMIT):
        Lives(place=str(place)).begin(restored=True)
    Lives(place=str(place), short=0.01).begin(restored=restored)
    until(lambda: not place.exists(), "the count to go")
    assert Lives(place=str(place)).count == 0


def test_what_is_not_ours_is_no_count(tmp_path: Path) -> None:
    """One of another file system, a link, a directory and nonsense count nothing; they stand in nobody's way."""
    place = tmp_path / "count"
    Lives(place=str(place)).begin(restored=True)
    device, _ = place.read_text().split()
    for text in ("", "x", f"{int(device) + 1} 5", f"{device} five"):
        place.write_text(text)
        assert Lives(place=str(place)).count == 0, text
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text(f"{device} 5")
    place.unlink()
    place.symlink_to(elsewhere)
    lives = Lives(place=str(place))
    assert lives.count == 0
    lives.begin(restored=True)
    assert Lives(place=str(place)).count == 1
    assert elsewhere.read_text() == f"{device} 5"
    assert Lives(place=str(tmp_path / "no" / "folder")).count == 0
