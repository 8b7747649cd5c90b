"""The code blocks of the README run as they are."""

import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from adapters_jax.app.cli.main import main
from adapters_jax.pretrained.assets import cached

README = (Path(__file__).parents[1] / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
SHELL = [
    line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()
]


def blocks():
    """The numbers of the blocks; the one that runs the contract tests is slow."""
    for number, block in enumerate(PYTHON):
        slow = "check_method(" in block  # tests/test_plugin.py is quicker
        yield pytest.param(number, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize("number", list(blocks()))
def test_python_runs_as_pasted(number, tmp_path, monkeypatch):
    for asset in re.findall(r'fetch\("(.*?)"\)', PYTHON[number]):
        if cached(asset) is None:
            pytest.skip(f"{asset} is not in the cache")
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(PYTHON[number], f"README block {number}", "exec"), {})
    for line, expected in re.findall(r"print\((.*?)\)  # (.*)", PYTHON[number]):
        assert expected in printed.getvalue(), line


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("adapters-jax plan")])
def test_plans_run_as_pasted(line):
    command = [sys.executable, "-m", "adapters_jax.app.cli.main", *shlex.split(line)[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.search(r"largest batch.* \d+ ", done.stdout)
    assert "4,194,304" in done.stdout


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("adapters-jax audit")])
def test_commands_run_as_pasted(line, capsys):
    assert main(shlex.split(line)[1:]) == 0
    printed = capsys.readouterr().out
    assert "18,874,368" in printed or "18874368" in printed or "2,379,264" in printed


def test_the_two_commands_are_there():
    commands = [line for line in SHELL if line.startswith("python3 -m venv ")]
    assert len(commands) == 2
    assert "adapters-jax finetune" in commands[0]
    assert "pytest" in commands[1]
