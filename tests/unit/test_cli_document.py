"""The page on the command line names every verb and every option that there is."""

from __future__ import annotations

import importlib
from pathlib import Path

import click
import pytest

from chrek.cli.program import VERBS

PAGE = (Path(__file__).parents[2] / "docs/cli.md").read_text()


@pytest.mark.parametrize("verb", VERBS)
def test_names_every_option(verb: str) -> None:
    """Each verb has a place in the page, and each of its options is named there."""
    assert f"`{verb}" in PAGE
    command: click.Command = importlib.import_module(f"chrek.cli.{verb}").command
    for parameter in command.params:
        if isinstance(parameter, click.Option) and not parameter.hidden:
            assert f"{parameter.opts[0]}" in PAGE, parameter.opts[0]
