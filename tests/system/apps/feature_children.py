"""Nested children, a daemon whose parents are gone, a zombie and a stopped child keep their places in the tree."""
import os
import signal
import time


def setup():
    nested = os.pipe()
    if os.fork() == 0:
        if os.fork() == 0:
            if os.fork() == 0:
                os.write(nested[1], b"%d\n" % os.getpid())
                time.sleep(1000)
            os.wait()
        os.wait()
    deepest = int(os.read(nested[0], 20))
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.write(nested[1], b"%d\n" % os.getpid())
            time.sleep(1000)
        os._exit(0)
    os.wait()
    daemon = int(os.read(nested[0], 20))
    zombie = os.fork()
    if zombie == 0:
        os._exit(7)
    os.waitid(os.P_PID, zombie, os.WEXITED | os.WNOWAIT)
    stopped = os.fork()
    if stopped == 0:
        time.sleep(1000)
    os.kill(stopped, signal.SIGSTOP)
    os.waitpid(stopped, os.WUNTRACED)
    return deepest, daemon, zombie, stopped, os.getpid()


def parent(pid):
    return int(open("/proc/%d/stat" % pid).read().rpartition(")")[2].split()[1])


def check(state):
    deepest, daemon, zombie, stopped, me = state
    assert os.getpid() == me
    assert parent(parent(parent(deepest))) == me
    assert parent(daemon) == me, "orphans come to the application"
    assert os.waitpid(zombie, 0) == (zombie, 7 << 8)
    deadline = time.monotonic() + 5  # this process may run before that one is stopped again
    while open("/proc/%d/stat" % stopped).read().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(stopped, signal.SIGKILL)
    assert os.waitpid(stopped, 0)[1] == signal.SIGKILL
    for pid in (deepest, daemon):
        os.kill(pid, signal.SIGKILL)
