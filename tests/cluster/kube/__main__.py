"""A one-node Kubernetes for tests.

up      build what is missing, start the cluster, print the shell line that points kubectl and helm at it
down    end it and take away everything it left
status  its programs and process ids; exit 0 when up, 3 when not
build   compile only
setup   install the Debian packages it needs
env     print that shell line again: eval "$(python3 -m tests.cluster.kube env)"
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time

from . import build, lifecycle, needs, processes
from .errors import ClusterError
from .layout import Layout


def main() -> int:
    """Run one verb; 0 when done, 1 with a message when not, 3 when `status` finds no cluster."""
    verbs = {"up": _up, "down": _down, "status": _status, "build": _build, "setup": _setup, "env": _env}
    parser = argparse.ArgumentParser(
        prog="python3 -m tests.cluster.kube",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=verbs)
    verb = parser.parse_args().verb
    # A terminated `up` takes back what it made, as an interrupted one does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return verbs[verb](Layout())
    except ClusterError as error:
        sys.stderr.write("\n".join([f"cluster: {error}", *getattr(error, "__notes__", []), ""]))
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("cluster: interrupted; what was made is removed\n")
        return 130


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


class _Clock:
    def __init__(self) -> None:
        self._start = time.monotonic()

    def say(self, message: str) -> None:
        _say(f"{time.monotonic() - self._start:6.1f} s  {message}")


def _up(layout: Layout) -> int:
    clock = _Clock()
    with lifecycle.exclusive():
        if lifecycle.running(layout) is None:
            lifecycle.up(layout, clock.say)
        layout.kept.touch()
    clock.say("up")
    return _env(layout)


def _down(layout: Layout) -> int:
    clock = _Clock()
    with lifecycle.exclusive():
        lifecycle.down(layout)
    clock.say("down, nothing left")
    return 0


def _status(layout: Layout) -> int:
    alive = processes.alive(layout)
    for name in processes.programs(layout):
        _say(f"{name:24} {alive.get(name, '-')}")
    state = "up" if lifecycle.running(layout) else "half up" if alive or layout.run.exists() else "down"
    _say(state)
    return 0 if state == "up" else 3


def _build(layout: Layout) -> int:
    clock = _Clock()
    with lifecycle.exclusive():
        build.build(layout, clock.say)
    clock.say("built")
    return 0


def _setup(layout: Layout) -> int:
    absent = needs.packages()
    if absent:
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "update", "-qq"], env=environment, check=True)
        install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *absent]
        subprocess.run(install, env=environment, check=True, stdout=subprocess.DEVNULL)
    for sentence in needs.missing(layout):
        _say(f"cluster: no test cluster on this machine, its tests will be skipped: {sentence}")
    return 0


def _env(layout: Layout) -> int:
    _say(f"export KUBECONFIG={layout.kubeconfig} PATH={layout.binaries}:$PATH")
    return 0


if __name__ == "__main__":
    sys.exit(main())
