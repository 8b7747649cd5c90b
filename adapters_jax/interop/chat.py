"""Chat templates: a conversation as the text that a model was trained to read."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from adapters_jax.errors import MissingPackageError, UserError


def render(
    template: str, messages: Iterable[Mapping[str, str]], *, reply: bool = True, **tokens: str
) -> str:
    """Renders a Hugging Face chat template, in jinja's sandbox since the file is not ours.

    Args:
        template: jinja source.
        messages: each with a `role` (system, user or assistant) and a `content`.
        reply: whether to end where the assistant's answer begins.
        **tokens: what the template may name: `bos_token`, `eos_token`, ...

    Returns:
        The text, special tokens spelt out: tokenize it without adding any.

    Raises:
        ValueError: there is no message, or the template is broken or refuses the messages.
        ImportError: jinja2 is not installed.

    Example:
        >>> template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        >>> render(template, [{"role": "user", "content": "Hello"}])
        '<user>Hello'
    """
    messages = list(messages)
    if not messages:
        raise UserError("a chat needs a message: write [{'role': 'user', 'content': '...'}].")
    values: dict[str, Any] = {
        "messages": messages,
        "add_generation_prompt": reply,
        "raise_exception": _refuse,
        **tokens,
    }
    jinja2 = _jinja2()
    try:
        return _compiled(template).render(values)
    except (jinja2.TemplateError, TypeError) as error:
        raise UserError(f"the chat template cannot render these messages: {error}") from error


def _jinja2() -> Any:
    try:
        import jinja2
        import jinja2.sandbox
    except ImportError as error:
        raise MissingPackageError("a chat template", "jinja2") from error
    return jinja2


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    """The template, ready to render; a data set renders the same one for every row."""
    environment = _jinja2().sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    return environment.from_string(template)


def _refuse(reason: str) -> NoReturn:
    """What templates call where roles are out of order; jinja lets the ValueError through."""
    raise UserError(f"the chat template cannot render these messages: {reason}")
