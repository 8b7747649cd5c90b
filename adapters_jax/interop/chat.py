"""Chat templates: a conversation as the text that a model was trained to read."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from adapters_jax.errors import MissingPackageError, UserError


def render(
    template: str, messages: Iterable[Mapping[str, str]], *, reply: bool = True, **tokens: str
) -> str:
    """Renders a Hugging Face chat template in jinja's sandbox, since the template is untrusted.

    Args:
        template: jinja source.
        messages: each with a `role` (system, user or assistant) and a `content`.
        reply: whether to end the text where the assistant's answer begins.
        **tokens: the special tokens that the template may use: `bos_token`, `eos_token`, ...

    Returns:
        The text with its special tokens; tokenize it without adding others.

    Raises:
        UserError: there is no message, or the template is broken or rejects the messages.
        MissingPackageError: jinja2 is not installed.

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
        "raise_exception": _raise,
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
    """The compiled template, cached because a data set renders the same one for every row."""
    environment = _jinja2().sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    return environment.from_string(template)


def _raise(reason: str) -> NoReturn:
    """Templates call this to reject messages; jinja does not catch the error."""
    raise UserError(f"the chat template cannot render these messages: {reason}")
