"""The parent of one container's PID 1, as a runtime's shim is: starts it, reaps it, reports how it ended.

Run as a program: ``shim.py CONTROL REPORT PIDFILE WORD...``, where WORD... is the runc command that starts the
container detached. REPORT is a descriptor for two lines: PID 1's process id, then its exit status (128 + n for a
signal). CONTROL is a descriptor whose other end the harness holds: when the harness is gone, however it ended, the
container is killed.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def main(control: int, report: int, pidfile: str, start: list[str]) -> int:
    """Start the container, wait for its end, report both."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for descriptor in (control, report):
        os.set_inheritable(descriptor, False)
    started = subprocess.run(start, check=False)
    if started.returncode:
        return started.returncode
    with open(pidfile) as file:
        pid = int(file.read())
    null = os.open("/dev/null", os.O_RDWR)
    for stream in (0, 1, 2):  # the container's streams are its own and the harness's from now on
        os.dup2(null, stream)
    ended = os.pidfd_open(pid)
    os.write(report, b"%d\n" % pid)
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    poll.register(control, select.POLLHUP)
    if ended not in [descriptor for descriptor, _ in poll.poll()]:
        signal.pidfd_send_signal(ended, signal.SIGKILL)
    while True:
        reaped, status = os.wait()
        if reaped == pid:
            break
    code = os.waitstatus_to_exitcode(status)
    try:
        os.write(report, b"%d\n" % (code if code >= 0 else 128 - code))
    except BrokenPipeError:
        return 1  # the harness is gone: nobody to tell
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:]))
