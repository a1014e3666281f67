"""A loopback connection of an IPv4 client to a server of both families survives with its data."""
import socket


def setup():
    listener = socket.create_server(("::", 8090), family=socket.AF_INET6, dualstack_ipv6=True)
    client = socket.create_connection(("127.0.0.1", 8090))
    server, address = listener.accept()
    assert address[0] == "::ffff:127.0.0.1"
    server.sendall(b"x" * 10000)
    return listener, client, server


def check(state):
    listener, client, server = state
    client.settimeout(5)
    server.settimeout(5)
    data = b""
    while len(data) < 10000:
        data += client.recv(20000)
    client.sendall(b"ping")
    assert server.recv(10) == b"ping"
    server.sendall(b"pong")
    assert client.recv(10) == b"pong"
