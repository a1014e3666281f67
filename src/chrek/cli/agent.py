"""``chrek agent``: the node's agent, as the chart's DaemonSet runs it."""

from __future__ import annotations

import os
from pathlib import Path

import click

from chrek.cli import options


@click.command()
@click.option(
    "--config",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The agent's settings as JSON; the chart writes them.",
)
@click.option(
    "--kubeconfig",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Way into the API outside a pod.  [default: the pod's service account]",
)
def command(*, config: Path | None, kubeconfig: Path | None) -> None:
    """Capture and restore the pods of this node until told to stop.

    NODE_NAME and POD_NAMESPACE in the environment say where it runs.
    """
    options.require_root("agent")
    from chrek.agent.config import load
    from chrek.agent.main import run

    settings = load(config, node=os.environ.get("NODE_NAME"), namespace=os.environ.get("POD_NAMESPACE"))
    run(settings, kubeconfig=kubeconfig)
