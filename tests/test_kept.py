"""Adapters that outlive a server: whole or not at all, one server at a time, also after a kill."""

import errno
import os
import shutil
import signal

import pytest
from helpers.errors import raises
from helpers.serving import serving
from starlette.testclient import TestClient
from test_serve import HERE, LIMITS, PROMPT, Served

from adapters_jax.errors import UserError
from adapters_jax.files import atomic
from adapters_jax.finetune.serving.api import application
from adapters_jax.finetune.serving.completions import TextApi
from adapters_jax.finetune.serving.kept import Kept


@pytest.fixture
def kept(tmp_path):
    kept = Kept(tmp_path / "kept")
    yield kept
    kept.close()


def folder(path, text):
    path.mkdir()
    (path / "adapter_config.json").write_text(text)
    return path


def texts(kept):
    return {n: (path / "adapter_config.json").read_text() for n, path in kept.paths().items()}


def test_adapters_are_kept_replaced_and_dropped(kept, tmp_path):
    first, second = folder(tmp_path / "first", "1"), folder(tmp_path / "second", "2")
    kept.put("a", first)
    kept.put("lock", first)
    kept.put("a", second)
    assert texts(kept) == {"a": "2", "lock": "1"}
    assert kept.drop("a") and not kept.drop("a")
    for name in ("..", ".", "../kept", ""):
        assert not kept.drop(name)
    assert texts(kept) == {"lock": "1"} and (tmp_path / "first").exists()
    with raises(UserError, "'lock'", "'Lock'"):
        kept.check("Lock")
    kept.check("lock")


def test_one_server_at_a_time(kept):
    with raises(UserError, kept.directory, os.getpid()):
        Kept(kept.directory)


class KilledError(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("name", ["a", "a.old", "a.new"])
def test_a_kill_leaves_the_old_adapter_or_the_new_one(tmp_path, monkeypatch, name):
    """At every change of a name on the disk, of which nothing is undone afterwards."""
    first, second = folder(tmp_path / "first", "1"), folder(tmp_path / "second", "2")
    rename, seen = os.replace, set()
    for killed_at in range(6):
        kept = Kept(tmp_path / f"kept-{killed_at}")
        kept.put(name, first)
        done = []

        def replace(*paths, done=done, last=killed_at):
            if len(done) >= last:
                done.append("killed")
                raise KilledError
            done.append(rename(*paths))

        def alive(work, done=done):
            return lambda *paths, **more: "killed" in done or work(*paths, **more)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            patch.setattr(shutil, "rmtree", alive(shutil.rmtree))
            patch.setattr(atomic, "_put_back", alive(atomic._put_back))
            try:
                kept.put(name, second)
                kept.drop(name)
            except KilledError:
                pass
        kept.close()
        again = Kept(kept.directory)
        seen.add(str(texts(again)))
        assert texts(again) in ({name: "1"}, {name: "2"}, {})
        assert killed_at >= 3 or texts(again)  # the third change is the drop
        names = [path.name for path in (kept.directory / "adapters").iterdir()]
        assert names in ([name], [])
        again.close()
    assert len(seen) == 3


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    served = Served(tmp_path_factory.mktemp("kept"))
    yield served
    served.engine.close()


@pytest.mark.slow
def test_requests_change_what_is_kept(served, kept, monkeypatch):
    api = TextApi(served.base, served.engine, "base", LIMITS, kept)
    client = TestClient(application(api, "", LIMITS), HERE)
    path = "/v1/adapters/new"
    assert client.put(path, files=served.files("second")).status_code == 201
    adapter = served.runs["second"] / "adapter"
    assert sorted(kept.paths()) == ["new"]
    for file in kept.paths()["new"].iterdir():
        assert file.read_bytes() == (adapter / file.name).read_bytes()
    bad = served.files("first", **{"adapter.safetensors": b"x" * 100})
    assert client.put(path, files=bad).status_code == 400
    assert (kept.paths()["new"] / "adapter.safetensors").stat().st_size > 100

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        answer = client.put("/v1/adapters/other", files=served.files("first"))
    message = answer.json()["error"]["message"]
    assert answer.status_code == 507 and "No space left" in message and "other" in message
    assert sorted(kept.paths()) == ["new"] and "other" in served.engine.adapters
    for name, status in (("new", 200), ("new", 404), ("other", 200)):
        assert client.delete(f"/v1/adapters/{name}").status_code == status
    assert kept.paths() == {}
    kept.put("damaged", adapter)  # as one that a server has left out
    assert client.delete("/v1/adapters/damaged").status_code == 200 and kept.paths() == {}


@pytest.mark.weekly
def test_a_server_that_is_killed_has_its_adapters_again(served, tmp_path, capfd):
    """In a process of its own; a damaged one is named and left out."""
    flags = ("--context", "48", "--rows", "2", "--keep", str(tmp_path / "kept"))
    base, run = str(served.base.decoder.files), f"first={served.runs['first']}"
    asked = {"model": "new", "prompt": PROMPT, "temperature": 0, "max_tokens": 8}

    def models(server):
        return [model["id"] for model in server.ask("/v1/models")["data"]][1:]

    def put(server, name, files):
        with TestClient(served.client.app) as form:
            request = form.build_request("PUT", f"/v1/adapters/{name}", files=files)
        return server.send(f"/v1/adapters/{name}", request.read(), request.headers["content-type"])

    with serving(base, run, "--room", "lora --rank 4", *flags) as server:
        put(server, "new", served.files("second"))
        put(server, "first", served.files("second"))
        put(server, "third", served.files("first"))
        answer = server.ask("/v1/completions", asked)["choices"]
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
    (tmp_path / "kept/adapters/third/adapter_config.json").write_text("{")
    with serving(base, run, *flags) as server:
        assert models(server) == ["first", "new"]
        for name in ("first", "new"):  # the kept one, in place of the run
            asked["model"] = name
            assert server.ask("/v1/completions", asked)["choices"] == answer
        assert server.ask("/v1/adapters/new", method="DELETE")["deleted"]
        shown = capfd.readouterr().err
        assert "third is not served" in shown, shown
        assert "first is what --keep has" in shown, shown
    with serving(base, run, *flags) as server:
        assert models(server) == ["first"]
