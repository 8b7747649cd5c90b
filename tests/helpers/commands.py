"""Errors of commands, expected by their type and by the data in their line, not by its English."""

import contextlib
import importlib
import shlex
import sys

import pytest

from adapters_jax.finetune.cli import main
from adapters_jax.finetune.console import Console
from adapters_jax.finetune.options.parsing import parse


def command_of(line):
    """The command that a line of a shell parses as."""
    program, name, *flags = shlex.split(line)
    assert program == "adapters-jax"
    module, attribute = main.COMMANDS[name]
    return parse(getattr(importlib.import_module(module), attribute), flags)


def announced(monkeypatch):
    """The list that gets the text of each wait that a command announces on a terminal."""
    texts = []

    def waiting(self, text):
        texts.append(text)
        return contextlib.nullcontext()

    monkeypatch.setattr(Console, "waiting", waiting)
    return texts


@contextlib.contextmanager
def command_raises(kind, *data):
    """Expects that a command ends with a user error of exactly this type, which names every datum.

    `main` turns the error into a line on stderr, so its type is taken from there.
    """
    errors, say = [], main._say

    def record(*arguments):
        errors.append(sys.exception())
        return say(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main, "_say", record)
        yield
    (error,) = errors
    assert type(error) is kind, f"{type(error).__name__}: {error}"
    missing = [datum for datum in map(str, data) if datum not in str(error)]
    assert not missing, f"the message lacks {missing}: {error}"
