"""A client outside the tree: after a restore the server gets an error or an end from that connection, and goes on serving."""
import os
import select
import socket


def setup():
    listener = socket.create_server(("0.0.0.0", 8080))
    print("listening", flush=True)
    connection, _ = listener.accept()
    assert connection.recv(5) == b"hello"
    epoll = select.epoll()
    epoll.register(connection, select.EPOLLIN)
    return listener, connection, epoll


def check(state):
    listener, connection, epoll = state
    if os.path.exists("/tmp/dynamo-restored"):
        assert epoll.poll(5), "the event loop is told"
        try:
            assert connection.recv(5) == b""
        except OSError:
            pass
    connection.close()
    fresh = socket.create_connection(("127.0.0.1", 8080), timeout=5)
    accepted, _ = listener.accept()
    accepted.sendall(b"hi")
    assert fresh.recv(10) == b"hi"
