"""Listening sockets stay, a connection between two ends in the tree survives with its data, one to outside is closed."""
import socket

OUTSIDE = (
    "import socket,time; s=socket.create_connection(('127.0.0.1',8081)); s.sendall(b'hello');\n"
    "print('connected', flush=True)\n"
    "while True: time.sleep(1)\n"
)


def setup():
    listener = socket.create_server(("0.0.0.0", 8080))
    client = socket.create_connection(("127.0.0.1", 8080))
    server, _ = listener.accept()
    server.sendall(b"x" * 10000)
    door = socket.create_server(("127.0.0.1", 8081))
    return listener, client, server, door, []


def check(state):
    listener, client, server, door, _ = state
    client.settimeout(5)
    server.settimeout(5)
    data = b""
    while len(data) < 10000:
        data += client.recv(20000)
    client.sendall(b"ping")
    assert server.recv(10) == b"ping"
    server.sendall(b"pong")
    assert client.recv(10) == b"pong"
    fresh = socket.create_connection(("127.0.0.1", 8080), timeout=5)
    accepted, _ = listener.accept()
    accepted.sendall(b"hi")
    assert fresh.recv(10) == b"hi"
