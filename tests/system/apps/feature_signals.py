"""Handlers, masks, pending and ignored signals, timers and alternate stacks are what they were."""
import os
import signal
import time


def setup():
    got = []
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, lambda number, frame: got.append(number))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    os.kill(os.getpid(), signal.SIGUSR1)
    signal.signal(signal.SIGALRM, lambda number, frame: got.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    return got


def check(got):
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR2)
    del got[:]
    os.kill(os.getpid(), signal.SIGUSR2)
    deadline = time.monotonic() + 5
    while not {signal.SIGUSR2, signal.SIGALRM} <= set(got):
        assert time.monotonic() < deadline, got
        time.sleep(0.01)
    assert signal.SIGUSR1 in signal.sigpending()
    signal.setitimer(signal.ITIMER_REAL, 0)
