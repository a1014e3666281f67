"""A thread that says again and again how far it has counted and on which host."""
import os
import threading
import time


def setup():
    count = [0]

    def beat():
        while True:
            count[0] += 1
            print("beat", count[0], os.uname().nodename, flush=True)
            time.sleep(0.05)

    threading.Thread(target=beat, daemon=True).start()
    return count


def check(count):
    before = count[0]
    time.sleep(0.2)
    assert count[0] > before > 0
