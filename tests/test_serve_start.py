"""A server before it can answer: its port, what it says while it is made, and what ends it."""

import http.client
import socket
import threading

import pytest
from helpers.commands import command_raises
from helpers.errors import raises
from starlette.responses import PlainTextResponse

from adapters_jax.errors import UserError
from adapters_jax.finetune.addresses import bind
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.serving.guard import Limits
from adapters_jax.finetune.serving.listening import Server


def ask(port, path, method="GET", body=None):
    """The status, the headers and the text of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, body)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, answer.headers, text


class Started:
    """A server in another thread, whose application is made once it may be."""

    def __init__(self, problem=None):
        self.go_on, self.said = threading.Event(), threading.Event()
        self.lines, self.ready = [], threading.Event()
        self.sockets = bind("127.0.0.1", 0)
        self.port = self.sockets[0].getsockname()[1]

        def make(says):
            says("compiling", "compiled 1 of 2 programs")
            self.said.set()
            self.go_on.wait(30)
            if problem:
                raise problem
            says("compiling", "compiled 2 of 2 programs")
            return PlainTextResponse("made"), self.ready.set

        self.server = Server(Limits(seconds=1, receiving=5), make, self.lines.append)
        self.thread = threading.Thread(target=self.server.run, args=(self.sockets,))

    def __enter__(self):
        self.thread.start()
        assert self.said.wait(30)
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.go_on.set()
        self.thread.join(30)


def test_it_answers_while_it_compiles():
    with Started() as started:
        status, headers, text = ask(started.port, "/healthz")
        assert (status, headers["retry-after"], text) == (503, "5", '{"status":"compiling"}')
        assert ask(started.port, "/livez")[::2] == (200, '{"status":"compiling"}')
        for path, method, body in (("/v1/models", "GET", None), ("/v1/adapters/a", "PUT", b"x")):
            status, headers, text = ask(started.port, path, method, body)
            assert (status, headers["retry-after"]) == (503, "5") and "compiling" in text
        assert not started.ready.is_set()
        started.go_on.set()
        assert started.ready.wait(30)
        assert ask(started.port, "/healthz")[::2] == (200, "made")
    assert started.lines == ["compiled 1 of 2 programs", "compiled 2 of 2 programs"]


def test_what_cannot_be_made_ends_the_server():
    with Started(UserError("no base")) as started:
        started.go_on.set()
        started.thread.join(30)
        assert not started.thread.is_alive()
    with raises(UserError, "no base"):
        started.server.making.result()
    with pytest.raises(ConnectionRefusedError):
        ask(started.port, "/healthz")


def test_a_server_that_ends_compiles_nothing_more():
    with Started() as started:
        started.server.should_exit = True
        started.go_on.set()
        started.thread.join(30)
    assert started.lines == ["compiled 1 of 2 programs"] and not started.ready.is_set()


def test_a_taken_port_is_found_before_the_base_is_read():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with command_raises(UserError, port, "127.0.0.1", "taken"):
            assert main(["serve", "no-such-base", "--port", str(port)]) == 2


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid", "a" * 70])
def test_an_address_of_another_machine_is_refused(host):
    with raises(UserError, host):
        bind(host, 0)


def test_every_address_of_a_host_has_the_same_port(monkeypatch):
    found = [(socket.AF_INET, None, None, "", (f"127.0.0.{n}", 0)) for n in (1, 2)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    sockets = bind("localhost", 0)  # macOS has the first address alone
    try:
        assert len({each.getsockname()[1] for each in sockets}) == 1
        assert "127.0.0.1" in {each.getsockname()[0] for each in sockets}
    finally:
        for each in sockets:
            each.close()
