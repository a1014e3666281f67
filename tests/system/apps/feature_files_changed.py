"""Changes the root: a file of the image replaced, one deleted, new ones made; says what it finds."""
import os


def setup():
    passwd = open("/etc/passwd").read()
    print("passwd", "changed" if "chrek-feature" in passwd else "own", os.path.exists("/etc/hosts.new"), flush=True)
    print("issue", os.path.exists("/etc/issue"), "marker", os.path.exists("/tmp/dynamo-restored"), flush=True)
    with open("/etc/passwd", "a") as file:
        file.write("chrek-feature:x:99:99::/:/bin/false\n")
    open("/etc/hosts.new", "w").close()
    if os.path.exists("/etc/issue"):
        os.unlink("/etc/issue")


def check(state):
    assert "chrek-feature" in open("/etc/passwd").read()
    assert not os.path.exists("/etc/issue") and os.path.exists("/etc/hosts.new")
