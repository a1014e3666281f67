"""The agent from start to end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import chrek
from chrek.agent import log
from chrek.agent.config import Config
from chrek.agent.controller import Controller
from chrek.agent.metrics import Metrics
from chrek.agent.node import Node
from chrek.agent.web import Web
from chrek.criu.bundle import Bundle
from chrek.engine.gpu import drive_back_leftovers
from chrek.errors import ChrekError, Reason
from chrek.kube import Api, Events, PodWatch

COMPONENT: Final = "chrek-agent"


def run(config: Config, *, kubeconfig: Path | None = None, started: Callable[[int], None] | None = None) -> None:
    """Run until SIGTERM or SIGINT; *started* is called with the HTTP port once it is open.

    Raises:
        ChrekError: there is no way into the API, or no CRIU.
    """
    log.start(form=config.log_format, level=config.log_level)
    ending = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ending.set())
    api = Api.connect(kubeconfig)
    bundle = Bundle.find()
    bundle.require()
    metrics = Metrics()
    node = Node(config, api, Events(api, component=COMPONENT, node=config.node), metrics)
    controller = Controller(node)

    def troubled(sentence: str) -> None:
        log.warning(sentence)
        if watch.failed is not None:
            metrics.api_failed(watch.failed.status)

    watch = PodWatch(
        api,
        node=config.node,
        namespace=config.namespace if config.scope == "namespace" else None,
        on_pod=controller.pod,
        on_gone=controller.gone,
        on_trouble=troubled,
    )
    with ExitStack() as stack:
        stack.callback(api.close)
        stack.callback(node.close)
        web = stack.enter_context(
            Web(config.port, healthy=controller.problem, ready=_ready(node, watch), metrics=metrics.text)
        )
        if started is not None:
            started(web.port)
        metrics.versions(criu=".".join(map(str, bundle.version())), driver=_driver(), runtime=_runtime(node))
        _drive_back()
        controller.start()
        watch.start()
        log.info(f"chrek {chrek.__version__} serves node {config.node}, {config.scope} {config.namespace}")
        ending.wait()
        log.info("ending: captures under way are undone")
        watch.stop()
        controller.stop()


def _drive_back() -> None:
    """Let go of GPU state that an agent killed in the middle of a capture left with the driver."""
    try:
        for stuck in drive_back_leftovers():
            log.warning(f"{stuck}; somebody has to look at it", reason=Reason.GPU_STUCK.code)
    except ChrekError as error:
        log.warning(str(error), reason=error.reason.code)


def _ready(node: Node, watch: PodWatch) -> Callable[[], str | None]:
    def check() -> str | None:
        if not watch.wait_until_synced(0):
            return f"the node's pods are not known yet{f': {watch.failed}' if watch.failed else ''}"
        if watch.failed is not None and watch.failed.denied:
            return f"the node's pods cannot be followed: {watch.failed}"
        if not os.access(node.config.store, os.R_OK | os.W_OK | os.X_OK):
            return f"the store {node.config.store} cannot be written"
        try:
            node.runtime.version()
        except ChrekError as error:
            return error.message
        return None

    return check


def _runtime(node: Node) -> str:
    try:
        return node.runtime.version()
    except ChrekError as error:
        log.warning(str(error), reason=error.reason.code)
        return ""


def _driver() -> str:
    """Return the version of NVIDIA's kernel driver, empty without one."""
    try:
        return Path("/sys/module/nvidia/version").read_text(encoding="ascii").strip()
    except OSError:
        return ""
