"""A pseudo-terminal pair with a shell-like child in its own session keeps its settings and its data."""
import os
import pty
import signal
import termios


def setup():
    pid, master = pty.fork()
    if pid == 0:
        while True:
            line = os.read(0, 100)
            os.write(1, b"<" + line.strip() + b">")
    attributes = termios.tcgetattr(master)
    attributes[3] &= ~termios.ECHO
    termios.tcsetattr(master, termios.TCSANOW, attributes)
    os.write(master, b"one\n")
    assert b"<one>" in os.read(master, 100)
    return pid, master


def check(state):
    pid, master = state
    assert not termios.tcgetattr(master)[3] & termios.ECHO
    os.write(master, b"two\n")
    assert b"<two>" in os.read(master, 100)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
