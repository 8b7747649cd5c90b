"""The command in errors about a missing package works in the present installation."""

import json
from importlib import metadata

import pytest

from adapters_jax.errors import MissingPackageError, install_command


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (None, "pip install 'adapters-jax[quant]'"),
        (
            {"url": "file:///home/me/my%20code", "dir_info": {"editable": True}},
            "pip install -e '/home/me/my code[quant]'",
        ),
        ({"url": "file:///src", "dir_info": {}}, "pip install '/src[quant]'"),
        (
            {"url": "file:///tmp/adapters_jax-0.1.0-py3-none-any.whl", "archive_info": {}},
            "pip install '/tmp/adapters_jax-0.1.0-py3-none-any.whl[quant]'",
        ),
        (
            {"url": "https://host/aj.git", "vcs_info": {"vcs": "git"}},
            "pip install 'adapters-jax[quant] @ git+https://host/aj.git'",
        ),
        (
            {"url": "https://host/aj.whl", "archive_info": {}},
            "pip install 'adapters-jax[quant] @ https://host/aj.whl'",
        ),
    ],
)
def test_by_the_origin_of_the_installation(monkeypatch, origin, command):
    class Installed:
        def read_text(self, name):
            assert name == "direct_url.json"
            return origin and json.dumps(origin)

    monkeypatch.setattr(metadata, "distribution", lambda name: Installed())
    assert install_command("quant") == command
    assert command in str(MissingPackageError("nf4", "qwix", "quant"))


def test_without_an_installation(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    assert install_command("tpu") == "pip install 'adapters-jax[tpu]'"
