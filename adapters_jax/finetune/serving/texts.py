"""Tokens as text: in pieces as they come, up to a text that ends a completion; and their places."""

import itertools
from collections.abc import Callable, Sequence

from adapters_jax.finetune.serving.requests import End

_BROKEN = "\N{REPLACEMENT CHARACTER}"  # what decodes from a part of a character
_MOST_PARTS = 4  # tokens of one character, which has as many bytes
_WINDOW = 16  # tokens without a text that are decoded again with the next one


class TextSink:
    """A sink that hands on text; it holds back what may be the beginning of a stop text.

    Args:
        decode: gives the text of all tokens so far, from the list of their ids.
        deliver: takes each piece of text.
        finish: takes the reason of the end, after the last piece.
        stops: texts that end the completion, and are no part of it.

    Example:
        >>> words = ["a ", "b", " en", "d", "!"]
        >>> pieces = []
        >>> sink = TextSink(
        ...     lambda ids: "".join(words[i] for i in ids),
        ...     pieces.append, pieces.append, [" end"])
        >>> [sink.token(i) for i in range(4)]
        [True, True, True, False]
        >>> sink.end("stop"); pieces
        ['a', ' b', 'stop']
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        deliver: Callable[[str], None],
        finish: Callable[[End], None],
        stops: Sequence[str] = (),
    ) -> None:
        self._decode, self._deliver, self._finish, self._stops = decode, deliver, finish, stops
        self._ids: list[int] = []
        self._sent = ""
        self._stopped = False

    @property
    def tokens(self) -> int:
        """The number of tokens so far."""
        return len(self._ids)

    def token(self, token: int) -> bool:
        """Hands on what is certain of the text; see `Sink`.

        Args:
            token: the id of the next token.

        Returns:
            Whether to go on; False once a stop text is there.
        """
        self._ids.append(token)
        text = self._decode(self._ids)
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        self._stopped = bool(found)
        self._send(text[: min(found)] if found else text[: self._certain(text)])
        return not found

    def end(self, why: End) -> None:
        """Hands on what was held back, and the reason; see `Sink`.

        Args:
            why: "stop", "length", "cancelled", "timeout", "not finite" or "closed".
        """
        if not self._stopped and self._ids:
            self._send(self._decode(self._ids))
        self._finish(why)

    def _certain(self, text: str) -> int:
        """The length of the text without a broken character or a part of a stop text behind."""
        whole = len(text.rstrip(_BROKEN))
        held = [
            size
            for stop in self._stops
            for size in range(1, len(stop))
            if text.endswith(stop[:size], 0, whole)
        ]
        return whole - max(held, default=0)

    def _send(self, text: str) -> None:
        if self._sent.startswith(text):
            return
        # Bytes that turn out to be no text change the characters that they were before; what was
        # handed on stays, and what comes from there on is new.
        pairs = zip(text, self._sent, strict=False)
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        self._deliver(text[same:])
        self._sent = text


def offsets_of(ids: Sequence[int], decode: Callable[[list[int]], str]) -> list[int]:
    """Where the text of each token begins in that of all; the parts of a character begin together.

    Args:
        decode: gives the text of tokens. That of one alone may lack the space before it.

    Example:
        >>> words = ["a", "film", "<end>"]
        >>> offsets_of([0, 1, 2, 1], lambda ids: " ".join(words[i] for i in ids if i < 2))
        [0, 1, 6, 6]
    """
    found, length, start, read = list[int](), 0, 0, 0
    for end in range(1, len(ids) + 1):
        found.append(length)
        before, now = decode([*ids[start:read]]), decode([*ids[start:end]])
        if now.endswith(_BROKEN) and end - read < _MOST_PARTS:
            continue
        length += len(now) - len(before)
        # The space before a token depends on the last one that has a text.
        start = start if now == before and end - start < _WINDOW else read
        read = end
    return found
