"""`adapters-jax convert` and `push`: write an adapter in a format, here or on the Hub."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from adapters_jax.errors import UserError
from adapters_jax.files import hub
from adapters_jax.finetune.console import Console
from adapters_jax.finetune.options.command import Command
from adapters_jax.finetune.options.flags import Format, flag, given
from adapters_jax.finetune.runs.stopping import StoppedError

if TYPE_CHECKING:
    from adapters_jax.finetune.leaving import Serving


@dataclass(frozen=True)
class Convert(Command):
    """Writes an adapter in the format of adapters_jax, PEFT, AdapterHub or llama.cpp, with a card.

    The format of the source is recognised by its files. Settings that the other library does not
    support raise an error that names them. What its files cannot hold is printed, and is in the
    card. Of a pickle tensors alone are read, and nothing in it is run.

    Servers load less than PEFT: --for says before writing what one takes of the adapter, and makes
    it so. Ranks and alphas that differ become one without loss. DoRA becomes LoRA, and a rank over
    the server's limit becomes a lower one, by the nearest change; what that loses is printed.

    Args:
        source: a finished run, a directory of an adapter in any of the formats, or the id of either
            on the Hugging Face Hub, optionally with @ and a revision; or a GGUF file.
        destination: directory to write, new or empty.
        to: the format. With native, a run also gets what predict and generate need; gguf is LoRA
            for llama.cpp.
        for_: with --to peft, the server that has to load it.
        rank: with --for or gguf, the rank of all modules; by default the largest of the adapter.
        max_error: with --for or gguf, the part of a weight's change that may be lost.
        model: the base model: minilm, smollm2-135m, a directory, a GGUF file, or an id on the Hub;
            by default the run's, or the one that the source names.
        pooling: what an encoder's head reads: mean, first token (cls) or pooler; a run has its own.
        head: also write an encoder's head; by default, where the format's library has such a head.
        license: license of the adapter in the card, such as apache-2.0.
        any_base: go on, with warnings, where the base is not the one of the training.
    """

    examples = """\
  adapters-jax convert runs/e2e-lora for-peft --to peft
  adapters-jax convert runs/reviews for-adapterhub --to adapterhub --no-head
  adapters-jax convert runs/e2e-dora for-vllm --to peft --for vllm --rank 64 \\
    --max-error 0.1
  adapters-jax convert runs/e2e-lora for-llama --to gguf
  adapters-jax convert user/their-lora@main ours --to native \\
    --model smollm2-135m"""
    positional = ("source", "destination")

    source: str
    destination: Path
    to: Format
    for_: Literal["vllm", "sglang"] | None = None
    rank: int | None = None
    max_error: float = 0.01
    model: str | None = None
    pooling: Literal["mean", "cls", "pooler"] | None = None
    head: bool | None = None
    license: str | None = None
    any_base: bool = False

    def prepare(self, console: Console) -> Callable[[], None]:
        """Reads the source, writes the destination, and returns a function that reports it."""
        from adapters_jax.finetune.leaving import describe, export, open_source

        server = self._server()
        source = open_source(self.source, self.model, self.pooling, self.any_base)
        written = export(
            source, self.destination, self.to, head=self.head, license=self.license, server=server
        )
        where = self.destination.as_posix()

        def report() -> None:
            for line in describe(written, self.to, where):
                console.say(line)
            console.result({"out": where, "from": source.form.name, "to": self.to, **vars(written)})

        return report

    def _server(self) -> Serving | None:
        from adapters_jax.finetune.leaving import Serving

        if self.for_ and self.to != "peft":
            raise UserError(f"--for {self.for_} with --to {self.to}: servers load --to peft")
        name = "llama.cpp" if self.to == "gguf" else self.for_
        if name is None:
            stray = [flag(each) for each in ("rank", "max_error") if each in given(self)]
            if stray:
                raise UserError(f"{', '.join(stray)}: for --for or --to gguf alone; leave it out")
            return None
        return Serving(name, self.rank, self.max_error)


@dataclass(frozen=True)
class Push(Command):
    """Uploads a finished run's adapter with a model card to the Hugging Face Hub.

    The repository is created if it does not exist. The token comes from `hf auth login` or
    HF_TOKEN. The upload has the adapter and what predict or generate needs, no rows and no paths.

    Args:
        run: directory of the run.
        repository: id of the repository on the Hub, user/name.
        to: the format: native, peft or adapterhub.
        private: make the repository private.
        revision: branch to upload to, which is created if it does not exist; by default main.
        head: also upload an encoder's head; by default, where the format's library has such a head.
        license: license of the adapter in the card, such as apache-2.0.
        dry_run: write what would be uploaded to --out, and upload nothing.
        out: directory to keep the uploaded files in; with --dry-run by default the repository's
            name.
        any_base: go on, with warnings, where files of the base changed since training.
    """

    examples = """\
  adapters-jax push runs/e2e-lora me/e2e-lora --license apache-2.0
  adapters-jax push runs/e2e-lora me/e2e-lora --to peft --private \\
    --revision peft
  adapters-jax push runs/e2e-lora me/e2e-lora --dry-run --out look-at-this"""
    positional = ("run", "repository")

    run: Path
    repository: str
    to: Format = "native"
    private: bool = False
    revision: str | None = None
    head: bool | None = None
    license: str | None = None
    dry_run: bool = False
    out: Path | None = None
    any_base: bool = False

    def prepare(self, console: Console) -> Callable[[], None]:
        """Writes the files, and checks everything that can be checked before the upload."""
        from adapters_jax.finetune.leaving import describe, export, open_source
        from adapters_jax.finetune.run_directory import Run

        user, _, name = self.repository.partition("/")
        if not user or not name or "@" in name or not hub.is_id(self.repository):
            raise UserError(
                f"{self.repository!r} is not the id of a repository; expected user/name"
            )
        Run(self.run).read_config(None)
        if not self.dry_run:
            _check_token()
        kept = self.out or (Path(name) if self.dry_run else None)
        if kept and self.out is None and kept.exists():
            raise UserError(f"{kept} exists already; give another directory with --out")
        directory = kept or Path(tempfile.mkdtemp(prefix="adapters-jax-push-"))
        try:
            source = open_source(str(self.run), any_base=self.any_base)
            options: Any = {"head": self.head, "license": self.license, "name": self.repository}
            written = export(source, directory, self.to, **options)
        except BaseException:
            _clear(directory, kept)
            raise

        def work() -> None:
            for line in describe(written, self.to, kept.as_posix() if kept else "the upload"):
                console.say(line)
            found = {"repository": self.repository, "to": self.to, **vars(written)}
            try:
                url = None if self.dry_run else self._upload(directory, console)
            finally:
                _clear(directory, kept)
            if self.dry_run:
                words = f"this would be uploaded to {self.repository}; nothing was"
                console.say(f"{words}: see {directory.as_posix()}")
            console.result({**found, "out": kept and kept.as_posix(), "url": url})

        return work

    def _upload(self, directory: Path, console: Console) -> str:
        """Uploads a directory; returns the commit's URL, or raises StoppedError."""
        import huggingface_hub

        api, repository = huggingface_hub.HfApi(), self.repository
        size = sum(path.stat().st_size for path in directory.iterdir())
        try:
            api.create_repo(repository, private=self.private or None, exist_ok=True)
            if self.private and not api.model_info(repository).private:
                raise StoppedError(
                    f"{repository} was not uploaded: it exists and is public; make it private on "
                    "the Hub, or leave --private out"
                )
            if self.revision:
                api.create_branch(repository, branch=self.revision, exist_ok=True)
            console.say(f"uploading {size:,} bytes to {repository}")
            commit = api.upload_folder(
                repo_id=repository,
                folder_path=directory,
                revision=self.revision,
                commit_message="An adapter by adapters_jax",
                # An older upload in another format would leave files that contradict these.
                delete_patterns=_stale(directory),
            )
        except StoppedError:
            raise
        except hub.problems() as error:
            raise StoppedError(
                f"{repository} was not uploaded: {hub.reason(error)}; see whether the token may "
                "write there: hf auth whoami"
            ) from error
        console.say(f"uploaded: {commit.commit_url}")
        return str(commit.commit_url)


def _check_token() -> None:
    """Raises UserError if there is no token, or the Hub is set to be offline."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE forbids uploading; unset it, or add --dry-run")
    if not get_token():
        raise UserError(
            "there is no token of the Hugging Face Hub: log in with `hf auth login`, set HF_TOKEN, "
            "or add --dry-run"
        )


def _stale(directory: Path) -> list[str]:
    """Names of files of other formats, which would contradict the files in a directory."""
    from adapters_jax.finetune.formats import every_file
    from adapters_jax.finetune.leaving import RUN_CONFIG

    every = {RUN_CONFIG, *every_file()}
    return sorted(every - {path.name for path in directory.iterdir()})


def _clear(directory: Path, kept: Path | None) -> None:
    if kept is None:
        shutil.rmtree(directory, ignore_errors=True)
