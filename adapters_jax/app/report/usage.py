"""The lines of shell and Python that use a finished run, for its page and its model card."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

TEXT, SECOND_TEXT, PROMPT = "A text of your own.", "Another one.", "A prompt of your own."


def shell_lines(name: str, config: Mapping[str, Any]) -> str:
    """Writes the command that predicts or generates with a run.

    Args:
        name: the run's directory, or its id on the Hugging Face Hub.
        config: the run's configuration.

    Returns:
        A line to paste into a shell.

    Example:
        >>> print(shell_lines("runs/my run", {"kind": "decoder"}))
        adapters-jax generate 'runs/my run' --prompt 'A prompt of your own.'
        >>> print(shell_lines("runs/mine", {"kind": "encoder", "pairs": False}))
        adapters-jax predict runs/mine 'A text of your own.' 'Another one.'
    """
    if config.get("kind") == "decoder":
        return shlex.join(["adapters-jax", "generate", name, "--prompt", PROMPT])
    return shlex.join(["adapters-jax", "predict", name, TEXT, SECOND_TEXT])


def python_lines(name: str, config: Mapping[str, Any], model: str | None = None) -> str:
    """Writes the program that predicts or generates with a run.

    Args:
        name: the run's directory, or its id on the Hugging Face Hub.
        config: the run's configuration.
        model: the base model's directory or id; by default the one in the run's configuration.

    Returns:
        Lines to paste into Python.

    Example:
        >>> print(python_lines("runs/mine", {"kind": "encoder", "pairs": False}))
        from adapters_jax.inference import load_predictor
        predictor = load_predictor('runs/mine')
        print(predictor.predict([('A text of your own.', None)]))
        >>> print(python_lines("user/mine", {"kind": "decoder"}, model="smollm2"))
        from adapters_jax.inference import load_generator
        generator = load_generator('user/mine', model='smollm2')
        print(*generator.generate(['A prompt of your own.']))
    """
    arguments = repr(name) if model is None else f"{name!r}, model={model!r}"
    if config.get("kind") == "decoder":
        return (
            "from adapters_jax.inference import load_generator\n"
            f"generator = load_generator({arguments})\n"
            f"print(*generator.generate([{PROMPT!r}]))"
        )
    row = (TEXT, SECOND_TEXT if config.get("pairs") else None)
    return (
        "from adapters_jax.inference import load_predictor\n"
        f"predictor = load_predictor({arguments})\n"
        f"print(predictor.predict([{row!r}]))"
    )
