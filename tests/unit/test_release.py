"""One version and one name: what `make images` builds is what the chart and the examples ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

import chrek

REPO = Path(__file__).parents[2]
CHART = REPO / "deploy/helm/charts/chrek"
IMAGE = "localhost/chrek-agent"


def _yaml(path: Path) -> Any:  # noqa: ANN401 - YAML
    return yaml.safe_load(path.read_text())


def test_the_chart_is_of_this_version() -> None:
    """The tag that the chart takes by default is the version of the program."""
    chart = _yaml(CHART / "Chart.yaml")
    assert (chart["name"], chart["appVersion"]) == ("chrek", chrek.__version__)
    image = _yaml(CHART / "values.yaml")["image"]
    assert (image["repository"], image["tag"], image["digest"]) == (IMAGE, "", "")


def test_make_images_builds_what_the_chart_asks_for() -> None:
    """Without a registry the build's name is the chart's default."""
    text = (REPO / "tools/images").read_text()
    assert "image=${push:-localhost}/chrek-agent:$version" in text.splitlines()


def test_examples_name_no_moving_tag() -> None:
    """An example's image of ours has this version; no image of a project's example has the tag latest."""
    found = [
        line.split("image:", 1)[1].strip()
        for path in (REPO / "examples/kubernetes").glob("*.yaml")
        for line in path.read_text().splitlines()
        if "image:" in line
    ]
    assert f"{IMAGE}:{chrek.__version__}" in found
    assert all(f"{IMAGE}:" not in image or image == f"{IMAGE}:{chrek.__version__}" for image in found)
    assert not [image for image in found if image.endswith(":latest") or ":" not in image.rpartition("/")[2]]
