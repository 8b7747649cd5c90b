"""A server in a process of its own: signals, clients that hang up, stall, or come by thousands."""

import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import HTTPError

import pytest
from helpers.serving import serving
from helpers.tiny import write_llama

pytestmark = pytest.mark.slow
ENDLESS = {"model": "llama", "prompt": "food", "temperature": 0}
FLAGS = ("--context", "2048", "--rows", "2", "--connections", "20", "--stall", "2")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llama"
    return str(write_llama(folder, seed=1, max_position_embeddings=4096))


@pytest.fixture(scope="module")
def server(llama):
    with serving(llama, "--room", "lora --rank 2", *FLAGS) as server:
        yield server


def eventually(check, seconds=20):
    """Waits until something is so."""
    until = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < until, "it did not become so"
        time.sleep(0.02)


@pytest.mark.weekly
def test_a_client_that_hangs_up_frees_its_row(server):
    for _ in range(3):  # more than there are rows
        texts = server.stream(**ENDLESS, max_tokens=1900)
        next(texts)
        texts.close()
    eventually(lambda: server.figure('adapters_jax_completions_total{end="cancelled"}') == 3)
    with socket.create_connection(server.place) as client:  # one that waits for a whole answer
        body = b'{"model": "llama", "prompt": "food", "temperature": 0, "max_tokens": 1900}'
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {server.place[0]}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        eventually(lambda: server.figure("adapters_jax_running") == 1)
    eventually(lambda: server.figure('adapters_jax_completions_total{end="cancelled"}') == 4)
    assert server.ask("/v1/completions", {**ENDLESS, "max_tokens": 3})["usage"] == {
        "prompt_tokens": 1,
        "completion_tokens": 3,
        "total_tokens": 4,
    }


def ended(client):
    """Whether the server has ended a connection, after all that it sent."""
    try:
        while client.recv(2**20):
            pass
    except ConnectionResetError:
        pass
    return True


def send_for_ever(client, request):
    while True:
        client.sendall(request * 100)


def test_clients_that_stall_are_cut_off(server):
    with socket.create_connection(server.place, timeout=30) as silent:
        assert ended(silent)
    with socket.create_connection(server.place, timeout=30) as half:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {server.place[0]}\r\n"
        half.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 9\r\n\r\n".encode())
        answer = half.recv(2**16)
        assert b"408" in answer.partition(b"\r\n")[0]
    request = f"GET /openapi.json HTTP/1.1\r\nHost: {server.place[0]}\r\n\r\n".encode()
    with socket.create_connection(server.place, timeout=1) as reader:  # never reads
        with pytest.raises((TimeoutError, ConnectionError)):
            send_for_ever(reader, request)
        time.sleep(3)
        with pytest.raises(ConnectionError):
            send_for_ever(reader, request)
    assert server.ask("/healthz") == {"status": "ok"}


def test_ten_thousand_connections_are_refused_in_order(server):
    held, refused = [], 0
    for i in range(10_000):
        if i % 1000 == 0:  # the server ends those that stall
            for client in held:
                client.close()
            held = [socket.create_connection(server.place) for _ in range(25)]
        with socket.create_connection(server.place, timeout=30) as client:
            answer = client.recv(2**10)
            assert not answer or (answer.startswith(b"HTTP/1.1 503 ") and b"Retry-After" in answer)
            refused += bool(answer)
    for client in held:
        client.close()
    assert refused > 9_900  # the others took the place of one that had stalled
    eventually(lambda: healthy(server))


def healthy(server):
    try:
        return server.ask("/healthz") == {"status": "ok"}
    except HTTPError as error:
        with error:  # the server has yet to see that others are gone
            if error.code != 503:
                raise
            return False


@pytest.mark.weekly
def test_sigterm_ends_the_server_once_its_answers_are_whole(llama):
    with serving(llama, *FLAGS) as server:
        whole = server.ask("/v1/completions", {**ENDLESS, "max_tokens": 1500})
        texts = server.stream(**ENDLESS, max_tokens=1500)
        said = [next(texts)]
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: closed(server.place))
        assert server.process.poll() is None
        said += texts
        assert "".join(s["choices"][0]["text"] for s in said) == whole["choices"][0]["text"]
        assert said[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
        assert server.process.wait(30) == -signal.SIGTERM


HEAD = b'--x\r\nContent-Disposition: form-data; name="f"; filename="adapter.safetensors"\r\n\r\n'
TAIL, MEGABYTE, LARGE = b"\r\n--x--\r\n", 2**20, 40


def upload(place):
    """Sends an adapter of 40 MB that is none; returns the status."""
    with socket.create_connection(place, timeout=120) as client:
        size = len(HEAD) + LARGE * MEGABYTE + len(TAIL)
        head = f"PUT /v1/adapters/large HTTP/1.1\r\nHost: {place[0]}\r\nContent-Length: {size}\r\n"
        head += "Content-Type: multipart/form-data; boundary=x\r\nConnection: close\r\n\r\n"
        client.sendall(head.encode() + HEAD)
        for _ in range(LARGE):
            client.sendall(b"\xff" * MEGABYTE)
        client.sendall(TAIL)
        return client.recv(2**16).split()[1]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of a process from /proc")
def test_twelve_uploads_take_the_memory_of_one(server):
    """The peak of the process, which the first upload raises, and twelve at once do not."""

    def peak():
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024

    before = peak()
    assert upload(server.place) == b"400"
    one = peak()
    with ThreadPoolExecutor(12) as pool:
        found = [*pool.map(upload, [server.place] * 12)]
    assert found == [b"400"] * 12
    assert one - before < LARGE and peak() - one < LARGE / 2
    assert server.ask("/healthz") == {"status": "ok"}


def test_a_whole_address_as_the_target(server):
    host, port = server.place
    for named, status in ((f"{host}:{port}", b"200"), ("evil.example", b"403")):
        with socket.create_connection(server.place, timeout=30) as client:
            head = f"GET http://{named}/healthz HTTP/1.1\r\nHost: evil.example\r\n\r\n"
            client.sendall(head.encode())
            assert client.recv(2**16).split()[1] == status


def test_a_port_that_another_server_has(server, llama):
    """Found before the base is read: the directory does not exist."""
    words = ("serve", f"{llama}-none", "--port", str(server.place[1]))
    done = subprocess.run(
        [sys.executable, "-m", "adapters_jax", *words], capture_output=True, text=True
    )
    lines = [line for line in done.stderr.splitlines() if "importing jax" not in line]
    assert done.returncode == 2 and len(lines) == 1 and "is taken" in lines[0]


@pytest.mark.weekly
def test_sigterm_while_it_compiles(llama):
    command = [sys.executable, "-m", "adapters_jax", "serve", llama, "--port", "0", *FLAGS]
    pipe = subprocess.PIPE  # with --json, progress goes to stderr
    with subprocess.Popen([*command, "--json"], stderr=pipe, stdout=pipe, text=True) as process:
        while not process.stderr.readline().startswith("compiling"):
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM
        assert not process.stdout.read()  # it never served


def closed(place):
    try:
        socket.create_connection(place, timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False
