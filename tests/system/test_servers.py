"""Servers that nobody here wrote: captured while clients ask them, killed, restored, asked again.

What is not installed is skipped by name; on Debian: nodejs, redis-server, nginx-light, default-jre-headless, puma, php-cli,
erlang-base.
"""

from __future__ import annotations

import http.client
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from chrekcli import DEADLINE, Running, chrek, reserve_port, until
from containers import needs

pytestmark = needs("root", "criu")

NODE = "const t=Math.random(); require('http').createServer((q,r)=>r.end(''+t)).listen({port},'127.0.0.1')"
JAVA = """
import com.sun.net.httpserver.HttpServer;
public class S {{ public static void main(String[] a) throws Exception {{
    byte[] body = String.valueOf(Math.random()).getBytes();
    HttpServer s = HttpServer.create(new java.net.InetSocketAddress("127.0.0.1", {port}), 0);
    s.createContext("/", x -> {{ x.sendResponseHeaders(200, body.length); x.getResponseBody().write(body); x.close(); }});
    s.start(); }} }}
"""
NGINX = """
user root; daemon off; worker_processes 2; pid {place}/pid; error_log {place}/error.log;
events {{}}
http {{ access_log off; client_body_temp_path {place}/b; proxy_temp_path {place}/p; fastcgi_temp_path {place}/f;
    uwsgi_temp_path {place}/u; scgi_temp_path {place}/s;
    server {{ listen 127.0.0.1:{port}; location / {{ return 200 "$pid"; }} }} }}
"""
PUMA = "t = rand.to_s; run ->(env) {{ [200, {{}}, [t]] }}"
ERLANG = """
-module(s). -export([m/0]).
m() -> {{ok, L}} = gen_tcp:listen({port}, [binary, {{active, false}}, {{reuseaddr, true}}]), loop(L, rand:uniform()).
loop(L, T) -> {{ok, S}} = gen_tcp:accept(L), gen_tcp:recv(S, 0),
    gen_tcp:send(S, ["HTTP/1.0 200 OK\\r\\nConnection: close\\r\\n\\r\\n", io_lib:format("~p", [T])]), gen_tcp:close(S), loop(L, T).
"""


@dataclass(frozen=True)
class Server:
    """A program, the file it reads, its command; ``{port}``, ``{place}`` and ``{file}`` are filled in."""

    program: str
    command: str
    file: tuple[str, str] = ("nothing", "")
    redis: bool = False


SERVERS = {
    "node": Server("node", "node {file}", ("s.js", NODE)),
    "java": Server("java", "java -Xmx128m {file}", ("S.java", JAVA)),
    "nginx": Server("nginx", "nginx -c {file}", ("nginx.conf", NGINX)),
    "redis": Server("redis-server", "redis-server --port {port} --save '' --dir {place}", redis=True),
    "ruby": Server("puma", "puma -w 2 --preload -b tcp://127.0.0.1:{port} {file}", ("config.ru", PUMA)),
    "erlang": Server("erlc", "sh -c 'cd {place} && erlc s.erl && exec erl -noshell -run s m'", ("s.erl", ERLANG)),
}


@dataclass
class Clients:
    """Clients that ask all the time, each over one connection as long as the server keeps it."""

    server: Server
    port: int
    answers: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def ask(self) -> str:
        """Ask once, over a connection of its own."""
        if self.server.redis:
            with socket.create_connection(("127.0.0.1", self.port), DEADLINE) as plain:
                plain.sendall(b"INFO server\r\n")
                text = plain.recv(65536).decode()
                return text.partition("run_id:")[2].split()[0]
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE)
        try:
            connection.request("GET", "/")
            return connection.getresponse().read().decode()
        finally:
            connection.close()

    def up(self) -> bool:
        """Whether the server answers."""
        try:
            return bool(self.ask())
        except (OSError, http.client.HTTPException):
            return False

    @contextmanager
    def asking(self, count: int = 4) -> Iterator[None]:
        """Have *count* threads ask until the block ends."""
        over = threading.Event()

        def work() -> None:
            while not over.is_set():
                try:
                    self.answers.append(self.ask())
                except (OSError, http.client.HTTPException) as error:
                    self.failures.append(repr(error))

        threads = [threading.Thread(target=work) for _ in range(count)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            over.set()
            for thread in threads:
                thread.join()


@pytest.fixture
def port() -> Iterator[int]:
    """A port that stays the test's."""
    with reserve_port() as held:
        yield int(held.getsockname()[1])


@pytest.mark.parametrize("name", sorted(SERVERS))
def test_server(name: str, port: int, tmp_path: Path) -> None:
    """No client fails while it is captured, and the restored server is the one that was captured."""
    server = SERVERS[name]
    if shutil.which(server.program) is None:
        pytest.skip(f"{server.program} is not installed")
    file = tmp_path / server.file[0]
    file.write_text(server.file[1].format(port=port, place=tmp_path))
    command = ["sh", "-c", "exec " + server.command.format(port=port, place=tmp_path, file=file)]
    store, clients = tmp_path / "store", Clients(server, port)
    with Running(["run", "--id", name], command, store=store, log=tmp_path / "log") as run:
        until(clients.up, "an answer")
        with clients.asking():
            done = chrek("checkpoint", name, "--pid", str(run.pid1), store=store)
            seen = len(clients.answers)
            until(lambda: len(clients.answers) > seen + 8, "answers after the capture")
        assert done.returncode == 0, done.stderr
    assert clients.failures == []
    with Running(["run", "--id", name], command, store=store, log=tmp_path / "log2") as run:
        run.await_said("start=")
        assert "start=restored" in run.said(), run.said()
        until(clients.up, "an answer")
        assert clients.ask() in clients.answers
