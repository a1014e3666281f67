"""Unix sockets: a listener by path, one in the abstract name space, a connected pair with data on its way, and a datagram."""
import socket


def setup():
    by_path = socket.socket(socket.AF_UNIX)
    by_path.bind("/tmp/feature.sock")
    by_path.listen()
    abstract = socket.socket(socket.AF_UNIX)
    abstract.bind("\0feature")
    abstract.listen()
    client = socket.socket(socket.AF_UNIX)
    client.connect("/tmp/feature.sock")
    server, _ = by_path.accept()
    server.sendall(b"on its way")
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    one.send(b"datagram")
    return by_path, abstract, client, server, one, two


def check(state):
    by_path, abstract, client, server, one, two = state
    assert client.recv(100) == b"on its way"
    client.sendall(b"back")
    assert server.recv(100) == b"back"
    assert two.recv(100) == b"datagram"
    for listener, address in ((by_path, "/tmp/feature.sock"), (abstract, "\0feature")):
        fresh = socket.socket(socket.AF_UNIX)
        fresh.settimeout(5)
        fresh.connect(address)
        accepted, _ = listener.accept()
        fresh.sendall(b"new")
        assert accepted.recv(10) == b"new"
