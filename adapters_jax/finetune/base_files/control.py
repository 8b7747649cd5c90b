"""Control tokens that a message spells stay text; those that a chat template writes do not.

A template writes `<|im_end|>` where a turn ends, and its whole text is encoded at once, so the same
characters in a user's message would end the turn as well. Therefore a mark is put into them before
the template sees the messages: what has no mark afterwards is the template's. To encode both in one
pass, with the merges of the tokenizer, a copy of it takes no text for a control token but aliases,
which replace those of the template, and are as long.

A template that makes one of the users' texts of several, or another text of one, could still make
a control token of them. A mark behind what a message ends with, if a control token begins so, is
for templates that write nothing between two messages.
"""

import itertools
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, models

from adapters_jax.errors import ChatTemplateError

# Characters that Unicode keeps for the inside of programs, so that no text has them.
MARK = "\ufdd0\ufdd1"
_ALIAS, _FILLER = 0xF0000, "\ufdd2"


class Tokens(NamedTuple):
    """An encoded text.

    Attributes:
        ids: the ids of its tokens.
        offsets: the first character and the end of each, in the text without marks.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]


class ControlTokens:
    """The control tokens of a tokenizer, in messages and in what a chat template makes of them.

    Args:
        others: texts of tokens that count as well, though the tokenizer does not call them special.

    Attributes:
        ids: their ids by text.

    Example:
        >>> from tokenizers import pre_tokenizers
        >>> tokenizer = Tokenizer(models.WordLevel({"<": 0, "end": 1, ">": 2}, "<"))
        >>> tokenizer.pre_tokenizer = pre_tokenizers.Punctuation()
        >>> _ = tokenizer.add_special_tokens(["<end>"])
        >>> control = ControlTokens(tokenizer)
        >>> text = control.marked("<end>") + "<end>"  # of a user, and of a template
        >>> control.encode(text)
        Tokens(ids=[0, 1, 2, 3], offsets=[(0, 1), (1, 4), (4, 5), (5, 10)])
    """

    def __init__(self, tokenizer: Tokenizer, others: Iterable[str] = ()) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder().items()
        known = {text: tokenizer.token_to_id(text) for text in others}
        special = {token.content: number for number, token in added if token.special}
        self.ids: dict[str, int] = special | {t: n for t, n in known.items() if n is not None}
        # A text of one character cannot have a mark inside.
        texts = [text for text in self.ids if len(text) > 1]
        self._aliases = {
            text: chr(_ALIAS + i) + _FILLER * (len(text) - 1) for i, text in enumerate(texts)
        }
        self._beginnings = {text[:n] for text in texts for n in range(1, len(text))}
        self._longest = max(map(len, texts), default=0)

    @cached_property
    def _finder(self) -> Tokenizer:
        """Finds texts as the tokenizer does: the longest of those that begin first."""
        finder = Tokenizer(models.WordLevel({MARK: 0}, MARK))
        others = [t.content for t in self._tokenizer.get_added_tokens_decoder().values()]
        texts = dict.fromkeys([*self._aliases, *others])
        finder.add_special_tokens([AddedToken(text, normalized=False) for text in texts])
        return finder

    def _found(self, text: str) -> list[tuple[int, int]]:
        """The first character and the end of each control token that a text spells."""
        found = self._finder.encode(text, add_special_tokens=False)
        spans = zip(found.ids, found.offsets, strict=True)
        return [(a, b) for number, (a, b) in spans if number and text[a:b] in self._aliases]

    def marked(self, value: Any) -> Any:
        """A message, or a part of it, with marks in the control tokens that it spells.

        Raises:
            ChatTemplateError: it has marks already.
        """
        if isinstance(value, str):
            return self._marked(value)
        if isinstance(value, Mapping):
            return {self.marked(key): self.marked(each) for key, each in value.items()}
        return [self.marked(each) for each in value] if isinstance(value, list | tuple) else value

    def _marked(self, text: str) -> str:
        if MARK in text:
            raise ChatTemplateError(
                "a message has U+FDD0 and U+FDD1, which are no characters; leave them out"
            )
        while found := self._found(text):  # one may lie in another
            cuts = [0, *(start + 1 for start, _ in found), len(text)]
            text = MARK.join(text[a:b] for a, b in itertools.pairwise(cuts))
        ends = (text[-n:] for n in range(1, min(self._longest, len(text) + 1)))
        return text + MARK if any(end in self._beginnings for end in ends) else text

    def is_spelt(self, text: str) -> bool:
        """Whether a rendered text has control tokens that a message spells."""
        return MARK in text and len(self._found(plain(text))) > len(self._found(text))

    def encode(self, text: str) -> Tokens:
        """Encodes a rendered text, whose special tokens the template has written.

        Raises:
            ChatTemplateError: the tokenizer cannot write a control token as text.
        """
        if MARK not in text:
            found = self._tokenizer.encode(text, add_special_tokens=False)
            return Tokens(found.ids, found.offsets)
        if _FILLER in text:
            raise ChatTemplateError("a message has U+FDD2, which is no character; leave it out")
        last, pieces = 0, []
        for start, end in self._found(text):
            pieces += [text[last:start], self._aliases[text[start:end]]]
            last = end
        copy, of_alias = self._copy
        found = copy.encode(plain("".join([*pieces, text[last:]])), add_special_tokens=False)
        ids = found.ids
        own = {*ids}.intersection(self.ids.values())
        spelt = plain(text)
        wrong = [each for a, b in self._found(spelt) if self.ids[each := spelt[a:b]] in own]
        if wrong:
            raise ChatTemplateError(
                f"a message spells {wrong[0]!r}, which the model's tokenizer cannot read as text; "
                "write it in another way"
            )
        return Tokens([of_alias.get(number, number) for number in ids], found.offsets)

    @cached_property
    def _copy(self) -> tuple[Tokenizer, dict[int | None, int]]:
        """The tokenizer with aliases, and the ids that they stand for.

        It is made when the first message spells a control token, since it takes seconds.
        """
        copy = Tokenizer.from_str(self._tokenizer.to_str())
        copy.encode_special_tokens = True
        added = {t.content: t for t in self._tokenizer.get_added_tokens_decoder().values()}
        names = ("lstrip", "rstrip", "normalized", "single_word")
        aliases = []
        for text, alias in self._aliases.items():
            like = added.get(text, AddedToken(text, normalized=False))
            flags = {name: getattr(like, name) for name in names}
            aliases.append(AddedToken(alias, special=False, **flags))
        copy.add_tokens(aliases)  # at once: each call builds the search for all of them anew
        ids = {copy.token_to_id(alias): self.ids[text] for text, alias in self._aliases.items()}
        return copy, ids


def plain(text: str) -> str:
    """A rendered text without marks."""
    return text.replace(MARK, "")


def without(text: str, position: int) -> int:
    """Where a position of a rendered text is without marks."""
    return position - len(MARK) * text.count(MARK, 0, position)
