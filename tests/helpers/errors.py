"""Errors, expected by their type and by the data in their message, not by its English."""

import contextlib

import pytest


@contextlib.contextmanager
def raises(kind, *data):
    """Expects an error of type `kind` whose one message names every datum: a path, number or name.

    Yields what `pytest.raises` yields.
    """
    with pytest.raises(kind) as caught:
        yield caught
    message = str(caught.value)
    missing = [datum for datum in map(str, data) if datum not in message]
    assert not missing, f"the message lacks {missing}: {message}"
