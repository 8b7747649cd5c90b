"""Readers that keep something between two files: servers, and the checkpoints of a run.

A refused upload leaves a server as it was: its adapters, and their answers. A checkpoint that is
damaged is put aside, and what is restored is what was saved.
"""

import io
from collections.abc import Callable, Mapping
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from starlette.testclient import TestClient

import adapters_jax as aj
from adapters_jax.files.checkpoint import Checkpoints
from adapters_jax.files.checksums import CHECKSUMS, write_checksums

from .mutators import Fixed
from .target import Files, files_of

# Uploads.

FORM = ("--x\r\n", "--x--\r\n", "\r\n\r\n", "Content-Disposition: form-data; ", 'filename="', "; ")
TYPE = "multipart/form-data; boundary=x"
_servers: dict[str, tuple[TestClient, Callable[[], Any]]] = {}  # one a process


def form(files: Files) -> bytes:
    """A form with some files."""
    head = 'Content-Disposition: form-data; name="files"; filename="{}"'
    parts = (f"--x\r\n{head.format(n)}\r\n\r\n".encode() + files[n] + b"\r\n" for n in files)
    return b"".join(parts) + b"--x--\r\n"


def uploads(folder: Path) -> Mapping[str, Files]:
    """The files of adapters, and forms of them as one file, for the server of each kind.

    The servers end with the process.
    """
    from test_serve import Served
    from test_serve_labels import labelling

    for name in ("decoder", "encoder"):
        (folder / name).mkdir()
    served = Served(folder / "decoder")
    client, runs, _, _ = ExitStack().enter_context(labelling(folder / "encoder"))
    text = {"model": "words", "texts": ["good film"]}
    _servers["encoder"] = client, lambda: client.post("/predict", json=text).json()
    _servers["decoder"] = served.client, lambda: served.ask(max_tokens=2).json()["choices"]
    words = {**files_of(runs["words"] / "adapter")}
    words["config.json"] = (runs["words"] / "config.json").read_bytes()
    seeds = {f"decoder-{n}": files_of(path / "adapter") for n, path in served.runs.items()}
    seeds["decoder-peft"] = _peft(served.runs["second"], folder / "peft")
    seeds["encoder-words"] = words
    forms = {f"{key}-form": {"form": form(files)} for key, files in seeds.items()}
    every = {**seeds, **forms}
    return {k: {**files, "server": Fixed(k.partition("-")[0])} for k, files in every.items()}


def _peft(run: Path, directory: Path) -> Files:
    from adapters_jax.finetune.cli.main import main

    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        assert main(["convert", str(run), str(directory), "--to", "peft"]) == 0
    return files_of(directory, "adapter_config.json", "adapter_model.safetensors")


def read_upload(directory: Path) -> None:
    """Sends the files to a server, and looks whether it is as it was."""
    client, ask = _servers[(directory / "server").read_text()]
    path, whole = "/v1/adapters/new", directory / "form"
    before = client.get("/v1/adapters").json(), ask()
    sent = [p for p in sorted(directory.iterdir()) if p.is_file() and not p.is_symlink()]
    if whole in sent:
        headers = {"content-type": TYPE}
        answer = client.put(path, content=whole.read_bytes(), headers=headers)
    else:
        files = [("files", (p.name, p.read_bytes())) for p in sent if p.name != "server"]
        answer = client.put(path, files=files)
    if answer.status_code in (200, 201):
        assert client.delete(path).status_code == 200
    assert (client.get("/v1/adapters").json(), ask()) == before
    assert answer.status_code < 500
    if answer.status_code >= 400:
        raise aj.UserError(answer.json()["error"]["message"])


# Checkpoints.

_SAVED = (1, 2)
_kept: dict[str, bytes] = {}  # arrays and checksums, as they were written


@cache
def _state() -> Any:
    base = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    model = aj.adapt(base, aj.LoRA("**", 2), rngs=nnx.Rngs(1))
    return aj.TrainState.create(model, tx=optax.adam(0.1), key=jax.random.key(0))


def _adapters(step: int) -> Any:
    """The adapters as they were saved at a step."""
    return jax.tree.map(lambda x: np.full(x.shape, step, x.dtype), _state().adapters)


def checkpoints(folder: Path) -> Mapping[str, Files]:
    """A directory of checkpoints; and one that gets checksums of what was spoilt.

    The arrays of the latter are whole: tensorstore, which reads them, waits for ever or ends the
    process where someone has changed them together with their checksums.
    """
    with Checkpoints(folder / "saved") as saved:
        for step in _SAVED:
            progress = {"metrics": [{"step": step}], "config": {"format": 1}}
            saved.save(step, replace(_state(), adapters=_adapters(step)), progress=progress)
    files = files_of(folder / "saved")
    _kept.update({n: x for n, x in files.items() if "/arrays/" in n or n.endswith(CHECKSUMS)})
    others = {name: data for name, data in files.items() if name not in _kept}
    return {"sealed": files, "sealed again": {**others, "seal": Fixed("")}}


def read_checkpoint(directory: Path) -> None:
    """Restores the newest whole checkpoint, as `finetune --resume` does."""
    if (directory / "seal").exists():
        for name, data in ((n, x) for n, x in _kept.items() if "/arrays/" in n):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(data)
        for step in _SAVED:
            write_checksums(directory / str(step))
    files = [path for path in directory.glob(f"*/{CHECKSUMS}") if path.is_file()]
    seals = {path.parent.name: path.read_bytes() for path in files}
    with Checkpoints(directory) as opened:
        opened.progress()
        adapters = opened.restore(_state()).state.adapters
    step = int(jax.tree.leaves(adapters)[0].ravel()[0])
    if seals[str(step)] == _kept[f"{step}/{CHECKSUMS}"]:
        jax.tree.map(np.testing.assert_array_equal, adapters, _adapters(step))
