"""Threads go on where they were, with their names, their locals and their locks."""
import threading
import time


def setup():
    counts = [0] * 8
    lock = threading.Lock()
    event = threading.Event()
    local = threading.local()
    seen = []

    def work(number):
        local.value = number
        while not event.is_set():
            counts[number] += 1
            time.sleep(0.005)
        with lock:
            seen.append(local.value)

    threads = [threading.Thread(target=work, args=(n,), name="w%d" % n) for n in range(8)]
    for thread in threads:
        thread.start()
    return counts, event, seen, threads, list(counts)


def check(state):
    counts, event, seen, threads, before = state
    deadline = time.monotonic() + 5
    while not all(now > then for now, then in zip(counts, before)):
        assert time.monotonic() < deadline, counts
        time.sleep(0.01)
    event.set()
    for thread in threads:
        thread.join(5)
    assert sorted(seen) == list(range(8)), seen
