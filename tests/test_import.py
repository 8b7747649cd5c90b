"""The modules that `import adapters_jax` imports."""

import json
import os
import subprocess
import sys
from dataclasses import asdict

import pytest

from adapters_jax.models.bert import BERT_BASE

EXTRAS = (
    *("matplotlib", "tokenizers", "grain", "sklearn", "huggingface_hub", "gguf", "qwix"),
    *("jinja2", "platformdirs"),
)
APPLICATION = ("cyclopts", *EXTRAS)
WITHOUT = f"""
import sys
sys.modules |= dict.fromkeys({EXTRAS})  # importing them raises an error
from adapters_jax.app.cli.main import main
sys.exit(main())
"""


@pytest.fixture
def command(tmp_path):
    """Runs a command in an empty directory and process, without the extras' packages."""
    environment = {**os.environ, "ADAPTERS_JAX_CACHE": str(tmp_path / "cache")}

    def run(*words):
        line = [sys.executable, "-c", WITHOUT, *words]
        return subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=environment)

    return run


@pytest.mark.parametrize(
    ("model", "adapters"),
    [
        ("bert-base", 24 * 4 * (768 + 768)),
        ("Llama-3.2-1B-Instruct", 16 * 4 * (2 * 2048 + 2048 + 512)),
        ("minilm", 12 * 4 * (384 + 384)),  # a pinned model, which is not in the cache
        ("here", 24 * 4 * (768 + 768)),
    ],
)
def test_audit_needs_neither_the_extras_nor_weights(command, tmp_path, model, adapters):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "config.json").write_text(json.dumps(asdict(BERT_BASE)))
    done = command("audit", "--model", model, "--method", "lora", "--rank", "4", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["adapter_parameters"] == adapters
    assert not (tmp_path / "cache").exists()


def test_a_command_that_needs_an_extra_says_so_in_one_line(command, tmp_path):
    done = command("predict", "runs/mine", "text")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "pip install 'adapters-jax[finetune]'" in line
    done = command("audit", "--model", "me/mine", "--method", "lora")
    assert done.returncode == 2 and "huggingface_hub" in done.stderr


def test_models_needs_no_extra(command):
    done = command("models", "bert-base")
    assert (done.returncode, done.stderr) == (0, "")
    assert "108,891,648" in done.stdout


def test_the_core_imports_nothing_of_the_application():
    code = "import sys, adapters_jax; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert "adapters_jax.nnx" in imported
    assert not imported & {
        *APPLICATION,
        "adapters_jax.app",
        "adapters_jax.data",
        "adapters_jax.inference",
        "adapters_jax.models",
        "adapters_jax.tasks",
    }


def test_importing_the_commands_starts_no_backend():
    code = "from adapters_jax.app.cli import compare, finetune, serve; import jax._src.xla_bridge"
    code += " as bridge; print(bridge._backends)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "{}\n"), done.stderr
