"""A server in a process of its own, as the command line starts it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.request


class Server:
    """A running `adapters-jax serve`; `ask` gives a whole answer, `stream` one event at a time."""

    def __init__(self, process, address):
        self.process, self.address = process, address
        host, _, port = address.removeprefix("http://").rpartition(":")
        self.place = host, int(port)

    def open(self, path, body=None, method=None, timeout=60):
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.address}{path}", data, headers, method=method)
        return urllib.request.urlopen(request, timeout=timeout)

    def ask(self, path, body=None, **options):
        with self.open(path, body, **options) as answer:
            return json.load(answer)

    def send(self, path, body, kind):
        """Puts a body of some type, and returns the answer."""
        headers = {"Content-Type": kind}
        request = urllib.request.Request(f"{self.address}{path}", body, headers, method="PUT")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def figure(self, name):
        """A figure of /metrics; 0 if there is none yet."""
        with self.open("/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} "))

    def stream(self, **body):
        """The texts of a stream, as they come."""
        with self.open("/v1/completions", {**body, "stream": True}) as answer:
            for line in answer:
                if line.startswith(b"data: {"):
                    yield json.loads(line.removeprefix(b"data: "))


@contextlib.contextmanager
def serving(*flags, env=None, entry=("-m", "adapters_jax")):
    """Starts a server on a free port, and ends it afterwards."""
    command = [sys.executable, *entry, "serve", *flags, "--port", "0", "--json"]
    whole = {**os.environ, **(env or {})}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=whole, text=True)
    try:
        line = process.stdout.readline()
        assert line, f"the server ended with {process.wait()}"
        yield Server(process, json.loads(line)["address"])
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
