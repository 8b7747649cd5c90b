"""The format of a decoder's prompts."""

import string
from dataclasses import dataclass
from typing import Any, Protocol

from adapters_jax.errors import UserError

PROMPT = "{prompt}"


class Encodes(Protocol):
    """What encodes texts: a decoder's tokenizer, and its chat template."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, as of the package tokenizers."""

    def chat(self, prompt: str) -> str:
        """A user's message in the chat template."""

    def encode(self, text: str) -> Any:
        """The tokens of what `chat` returned."""


@dataclass(frozen=True)
class Prompts:
    r"""The format of a decoder's prompts; saved with a run, so that generation uses it, too.

    Args:
        template: text with the field `{prompt}`; a `\n` in it is a new line.
        chat: whether that text becomes a user's message in the model's chat template.

    Raises:
        UserError: the template has another field, or lacks this one.

    Example:
        >>> Prompts("Say it: {prompt}\\n", chat=False).text("hello", decoder=None)
        'Say it: hello\n'
    """

    template: str = PROMPT
    chat: bool = True

    def __post_init__(self) -> None:
        try:
            fields = [name for _, name, _, _ in string.Formatter().parse(self.template)]
        except ValueError as error:
            raise UserError(f"--template {self.template!r}: {error}; write {{{{ for {{") from error
        unknown = [f"{{{name}}}" for name in fields if name not in (None, "prompt")]
        if unknown:
            raise UserError(
                f"--template {self.template!r}: no field {', '.join(unknown)}; it has {PROMPT}, "
                "which --prompt COLUMN fills"
            )
        if "prompt" not in fields:
            raise UserError(f"--template {self.template!r}: it lacks the field {PROMPT}")

    def text(self, prompt: str, decoder: Encodes) -> str:
        """The formatted prompt."""
        filled = self.template.replace(r"\n", "\n").format(prompt=prompt)
        return decoder.chat(filled) if self.chat else filled

    def encode(self, prompt: str, decoder: Encodes) -> list[int]:
        """The token ids of the formatted prompt; a chat template writes special tokens itself.

        A control token that the prompt spells is text in a chat, and a control token in a prompt
        without a template, as such prompts may need.
        """
        text = self.text(prompt, decoder)
        return (decoder if self.chat else decoder.tokenizer).encode(text).ids
