"""Pipes and FIFOs keep the data in them; a blocked reader is woken by what comes after the restore."""
import os
import threading


def setup():
    reading, writing = os.pipe()
    os.write(writing, b"in the pipe")
    os.mkfifo("/tmp/fifo")
    fifo = os.open("/tmp/fifo", os.O_RDWR)
    os.write(fifo, b"in the fifo")
    empty = os.pipe()
    got = []
    thread = threading.Thread(target=lambda: got.append(os.read(empty[0], 10)))
    thread.start()
    return reading, writing, fifo, empty, got, thread


def check(state):
    reading, writing, fifo, empty, got, thread = state
    assert os.read(reading, 100) == b"in the pipe"
    assert os.read(fifo, 100) == b"in the fifo"
    os.write(empty[1], b"wake")
    thread.join(5)
    assert got == [b"wake"]
