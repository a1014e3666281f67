"""The agent, ended by SIGKILL at a chosen step: ``mortal.py STEP agent …``; the arguments are those of `chrek`.

STEP is ``call:FUNCTION`` or ``return:FUNCTION``, the function by its qualified name, with ``NAME=VALUE`` behind a further
colon where one of its arguments counts. The program under test is not changed: the interpreter's own profiler watches
it. With ``ALONE`` in the environment only the agent's own process dies, as of a fault; else all that runs in its
control group does, as when its container ends.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

import chrek.cli
from chrek.system import procfs
from chrek.system.ids import HostPid


def end() -> None:
    """End as a container ends, or alone."""
    mine = os.getpid()
    if "ALONE" not in os.environ:
        group = _group(mine)
        for pid in procfs.tree(HostPid(mine)):
            if pid != mine and _group(pid) == group:
                os.kill(pid, signal.SIGKILL)
    os.kill(mine, signal.SIGKILL)


def watch(step: str) -> None:
    """End at this step, in whichever thread it comes."""
    kind, _, rest = step.partition(":")
    function, _, condition = rest.partition(":")
    name, _, value = condition.partition("=")

    def profile(frame: FrameType, event: str, _: object) -> None:
        if (
            event == kind
            and frame.f_code.co_qualname == function
            and (not name or str(frame.f_locals.get(name)) == value)
        ):
            end()

    threading.setprofile(profile)


def _group(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cgroup").read_text()
    except OSError:
        return ""


if __name__ == "__main__":
    watch(sys.argv.pop(1))
    chrek.cli.main()
