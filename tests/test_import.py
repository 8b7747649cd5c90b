"""The modules that `import adapters_jax` imports."""

import subprocess
import sys

APPLICATION = (
    "cyclopts",
    "matplotlib",
    "tokenizers",
    "grain",
    "sklearn",
    "huggingface_hub",
    "gguf",
    "qwix",
)


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
