"""Shared memory by name (/dev/shm), shared anonymous memory between two processes, and a spawned semaphore's deleted name."""
import mmap
import multiprocessing
import os
import signal
from multiprocessing import shared_memory


def setup():
    named = shared_memory.SharedMemory(create=True, size=1 << 20, name="chrek-feature")
    named.buf[:4] = b"name"
    anonymous = mmap.mmap(-1, 1 << 20)
    anonymous[:4] = b"anon"
    semaphore = multiprocessing.get_context("spawn").Semaphore(3)
    semaphore.acquire()
    ask, answer = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        while os.read(ask[0], 1):
            anonymous[4:8] = b"ROUT"
            named.buf[4:8] = b"pong"
            os.write(answer[1], bytes(anonymous[:4]) + bytes(named.buf[:4]))
        os._exit(0)
    return named, anonymous, semaphore, ask[1], answer[0], child


def check(state):
    named, anonymous, semaphore, ask, answer, child = state
    os.write(ask, b"?")
    assert os.read(answer, 8) == b"anonname"
    assert bytes(anonymous[:8]) == b"anonROUT"
    assert bytes(named.buf[:8]) == b"namepong"
    assert os.path.getsize("/dev/shm/chrek-feature") == 1 << 20
    again = shared_memory.SharedMemory(name="chrek-feature")
    assert bytes(again.buf[:8]) == b"namepong"
    semaphore.acquire()
    semaphore.acquire()
    assert not semaphore.acquire(timeout=0.01)
    semaphore.release()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
