"""Ten workers forked from one parent still share its memory: together they are not larger than before."""
import mmap
import os
import random
import signal

SIZE = 48 << 20


def memory():
    total = 0
    for pid in os.listdir("/proc"):
        if pid.isdigit() and int(pid) in PIDS:
            with open("/proc/%s/smaps_rollup" % pid) as file:
                fields = dict(line.split(":", 1) for line in list(file)[1:])
            total += int(fields["Pss"].split()[0])
    return total


PIDS = set()


def setup():
    global PIDS
    data = mmap.mmap(-1, SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    data.write(random.Random(1).randbytes(SIZE))
    pipes = []
    for number in range(10):
        ask, answer = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            data[number * 4096] = number
            while os.read(ask[0], 1):
                os.write(answer[1], bytes([data[number * 4096], data[SIZE - 1]]))
            os._exit(0)
        PIDS.add(pid)
        pipes.append((ask[1], answer[0]))
    PIDS.add(os.getpid())
    return data, pipes, memory()


def check(state):
    data, pipes, before = state
    for number, (ask, answer) in enumerate(pipes):
        os.write(ask, b"?")
        assert os.read(answer, 2) == bytes([number, data[SIZE - 1]])
    assert data[:] == random.Random(1).randbytes(SIZE)
    now = memory()
    # 48 MB for each of the ten would be 480,000 kB more.
    assert now < before + 40_000, (before, now)
    for pid in PIDS - {os.getpid()}:
        os.kill(pid, signal.SIGKILL)
