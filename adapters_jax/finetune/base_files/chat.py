"""Chat templates: a conversation as the text that a model was trained to read."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from adapters_jax.errors import ChatTemplateError, UserError, needed, shortened


def render(
    template: str,
    messages: Iterable[Mapping[str, Any]],
    *,
    reply: bool = True,
    tools: Sequence[Any] | None = None,
    **tokens: str,
) -> str:
    """Renders a Hugging Face chat template in jinja's sandbox, since the template is untrusted.

    Args:
        template: jinja source.
        messages: each with a `role` (system, user, assistant or tool) and a `content`.
        reply: whether to end the text where the assistant's answer begins.
        tools: the JSON schemas of the functions that the assistant may call.
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
    return render_marked(template, messages, reply=reply, tools=tools, **tokens)[0]


def render_marked(
    template: str,
    messages: Iterable[Mapping[str, Any]],
    *,
    reply: bool = True,
    tools: Sequence[Any] | None = None,
    **tokens: str,
) -> tuple[str, list[tuple[int, int]]]:
    """Renders a chat template as `render` does, and finds what it marks as generated.

    Returns:
        The text, and the first character and the end of each part of it that the template encloses
        in `{% generation %}`; no parts if it has none of these blocks.

    Raises:
        UserError: as for `render`.

    Example:
        >>> template = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
        >>> template += "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
        >>> template += "|{% endfor %}"
        >>> chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        >>> render_marked(template, chat)
        ('Hi|Hello|', [(3, 8)])
    """
    messages = list(messages)
    if not messages:
        raise UserError("a chat needs a message: write [{'role': 'user', 'content': '...'}].")
    values: dict[str, Any] = {
        "messages": messages,
        "add_generation_prompt": reply,
        "raise_exception": _raise,
        **({} if tools is None else {"tools": tools}),
        **tokens,
    }
    sandbox = _sandbox()
    try:
        return _unmarked(sandbox.render(template, values), sandbox.MARKS)
    except UserError:
        raise
    except sandbox.ERRORS as error:
        why = shortened(str(error) or type(error).__name__)
        raise ChatTemplateError(f"the chat template cannot render these messages: {why}") from error


def _unmarked(text: str, marks: tuple[str, str]) -> tuple[str, list[tuple[int, int]]]:
    """A text without marks, and where they were."""
    parts = re.split(f"({'|'.join(map(re.escape, marks))})", text)
    length, plain, starts, spans = 0, [], [], []
    for part in parts:
        if part == marks[0]:
            starts.append(length)
        elif part != marks[1]:
            plain.append(part)
            length += len(part)
        elif starts:
            spans.append((starts.pop(), length))
    return "".join(plain), spans


def _sandbox() -> Any:
    # Not at the top, since jinja2 is optional: encoders and GGUF files are read without it.
    with needed("a chat template", "jinja2"):
        import jinja2  # noqa: F401

        from adapters_jax.finetune.base_files import sandbox
    return sandbox


def _raise(reason: Any) -> NoReturn:
    """Templates call this to reject messages."""
    raise ChatTemplateError(
        f"the chat template cannot render these messages: {shortened(str(reason))}"
    )
