"""Open files: position, append, deleted while open, hard-linked and deleted by one name, truncated, a directory, a lock."""
import fcntl
import os


def setup():
    log = open("/var/log/feature.log", "a")
    log.write("before\n")
    log.flush()
    deleted = open("/tmp/deleted", "w+")
    deleted.write("no name" * 1000)
    deleted.flush()
    os.unlink("/tmp/deleted")
    linked = open("/tmp/one", "w+")
    linked.write("two names")
    linked.flush()
    os.link("/tmp/one", "/tmp/two")
    os.unlink("/tmp/one")
    locked = open("/tmp/locked", "w")
    fcntl.flock(locked, fcntl.LOCK_EX)
    posix = open("/tmp/posix", "w")
    fcntl.lockf(posix, fcntl.LOCK_EX)
    directory = os.open("/etc", os.O_RDONLY)
    odd = open(b"/tmp/odd-\xff\xfe-name", "w+")
    odd.write("odd")
    odd.flush()
    image = open("/etc/passwd")
    image.read(5)
    os.chdir("/var/lib")
    os.unlink("/etc/motd") if os.path.exists("/etc/motd") else None
    return log, deleted, linked, locked, posix, directory, odd, image


def check(state):
    log, deleted, linked, locked, posix, directory, odd, image = state
    log.write("after\n")
    log.flush()
    text = open("/var/log/feature.log").read()
    assert text == "before\nafter\n", text
    deleted.seek(0)
    assert deleted.read() == "no name" * 1000
    assert not os.path.exists("/tmp/deleted")
    linked.seek(0)
    assert linked.read() == "two names"
    assert os.fstat(linked.fileno()).st_ino == os.stat("/tmp/two").st_ino
    assert not os.path.exists("/tmp/one")
    other = open("/tmp/locked")
    try:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        raise AssertionError("the lock is gone")
    except BlockingIOError:
        pass
    if os.fork() == 0:
        try:
            fcntl.lockf(open("/tmp/posix", "w"), fcntl.LOCK_EX | fcntl.LOCK_NB)
            os._exit(1)
        except BlockingIOError:
            os._exit(0)
    assert os.wait()[1] == 0
    assert "passwd" in os.listdir(directory)
    assert open(b"/tmp/odd-\xff\xfe-name").read() == "odd"
    assert image.tell() > 0 and os.getcwd() == "/var/lib"
    assert not os.path.exists("/etc/motd")
