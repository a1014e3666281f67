"""epoll, eventfd, timerfd, signalfd and pidfd-free waiting work on."""
import ctypes
import os
import select
import signal
import struct
import time

libc = ctypes.CDLL(None)


def setup():
    epoll = select.epoll()
    event = libc.eventfd(5, 0o4000)
    timer = libc.timerfd_create(1, 0o4000)
    libc.timerfd_settime(timer, 0, struct.pack("llll", 0, 50_000_000, 0, 50_000_000), None)
    reading, writing = os.pipe()
    epoll.register(event, select.EPOLLIN)
    epoll.register(timer, select.EPOLLIN)
    epoll.register(reading, select.EPOLLIN | select.EPOLLET)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    mask = struct.pack("Q", 1 << (signal.SIGUSR1 - 1))
    signals = libc.signalfd(-1, mask, 0o4000)
    epoll.register(signals, select.EPOLLIN)
    return epoll, event, timer, reading, writing, signals


def check(state):
    epoll, event, timer, reading, writing, signals = state
    os.write(writing, b"x")
    os.kill(os.getpid(), signal.SIGUSR1)
    wanted, seen = {event, timer, reading, signals}, set()
    deadline = time.monotonic() + 5
    while seen != wanted:
        seen |= {fd for fd, _ in epoll.poll(1)}
        assert time.monotonic() < deadline, (wanted, seen)
    assert struct.unpack("Q", os.read(event, 8))[0] == 5
    assert struct.unpack("Q", os.read(timer, 8))[0] >= 1
    assert os.read(reading, 1) == b"x"
    assert struct.unpack_from("I", os.read(signals, 128))[0] == signal.SIGUSR1
