"""Chat templates: a conversation as the text that a model was trained to read."""

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from adapters_jax.errors import ChatTemplateError, MissingPackageError, UserError, shortened


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
        ChatTemplateError: the template is broken, takes too long, makes too much text or rejects
            the messages.
        UserError: there is no message.
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
    sandbox = _sandbox()
    try:
        return sandbox.render(template, values)
    except UserError:
        raise
    except sandbox.ERRORS as error:
        why = shortened(str(error) or type(error).__name__)
        raise ChatTemplateError(f"the chat template cannot render these messages: {why}") from error


def _sandbox() -> Any:
    try:
        import jinja2  # noqa: F401

        from adapters_jax.interop import sandbox
    except ImportError as error:
        raise MissingPackageError("a chat template", "jinja2") from error
    return sandbox


def _raise(reason: Any) -> NoReturn:
    """Templates call this to reject messages."""
    raise ChatTemplateError(
        f"the chat template cannot render these messages: {shortened(str(reason))}"
    )
