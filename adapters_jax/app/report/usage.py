"""How a run is used, from the command line and from Python: for its page and its card."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any


def command(config: Mapping[str, Any], name: str) -> str:
    """The command that uses a run.

    Example:
        >>> command({"kind": "decoder"}, "runs/mine")
        'adapters-jax generate runs/mine --prompt "A prompt of your own."'
    """
    if config.get("kind") == "decoder":
        return f'adapters-jax generate {shlex.quote(name)} --prompt "A prompt of your own."'
    return f'adapters-jax predict {shlex.quote(name)} "A text of your own." "Another one."'


def python(config: Mapping[str, Any], name: str, model: str | None = None) -> str:
    """Three lines of Python that use a run.

    Args:
        config: the run's.
        name: its directory or id.
        model: where its base is, if that has to be given.

    Example:
        >>> print(python({"kind": "encoder", "pairs": False}, "me/mine"))
        from adapters_jax.inference import load_predictor
        predictor = load_predictor('me/mine')
        print(predictor.predict([("A text of your own.", None)]))
    """
    where = f"{name!r}" if model is None else f"{name!r}, model={model!r}"
    if config.get("kind") == "decoder":
        return (
            "from adapters_jax.inference import load_generator\n"
            f"generator = load_generator({where})\n"
            'print(*generator.generate(["A prompt of your own."]))'
        )
    text = (
        '("A text of your own.", "Another one.")'
        if config.get("pairs")
        else ('("A text of your own.", None)')
    )
    return (
        "from adapters_jax.inference import load_predictor\n"
        f"predictor = load_predictor({where})\n"
        f"print(predictor.predict([{text}]))"
    )
