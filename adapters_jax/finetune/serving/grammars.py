"""Answers that are JSON of a schema: the tokens that may come next, from llguidance.

llguidance compiles a schema to a grammar, and says on the host, from token to token, which ones may
follow; the engine's programs get this as bits, whatever the schema is.
"""

from __future__ import annotations

import math
import threading
from functools import cached_property
from typing import Any

import numpy as np
import tokenizers

from adapters_jax.errors import UserError, needed, shortened

# As `json.dumps` writes it; without bounds on spaces, a model might write nothing else.
_SPACES: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

_JOINING = {"allOf", "anyOf", "oneOf", "$ref"}
_SAYING = {"$defs", "definitions", "$schema", "$id", "$comment", "title", "description", "default"}
_SAYING |= {"examples", "deprecated", "readOnly", "writeOnly", "discriminator"}
_MOST_WAYS = 2**16


def _check_patterns(schema: dict[str, Any]) -> None:
    """Refuses patterns that may have to hold together, but for small ones.

    llguidance lists the ways that all of them together can go on. Their number is the product of
    the patterns' own numbers, and its bounds do not see that: it would take all memory.

    Raises:
        UserError: there are too many of them, or they are too long.
    """
    patterns, joined, left = set[str](), False, [schema]
    while left:
        each = left.pop()
        if not isinstance(each, dict):
            left += each if isinstance(each, list) else ()
            continue
        left += each.values()
        alike = each.get("allOf")
        parts = len(alike) if isinstance(alike, list) else 0
        parts += len(each.keys() & (_JOINING - {"allOf"})) + bool(each.keys() - _JOINING - _SAYING)
        named = each.get("patternProperties")
        joined = joined or parts > 1 or isinstance(named, dict)  # other names match none of them
        found = [
            *(named if isinstance(named, dict) else ()),
            each.get("pattern"),
            each.get("format"),
        ]
        patterns |= {x for x in found if isinstance(x, str)}
    if joined and math.prod(1 + len(x) for x in patterns) > _MOST_WAYS:
        raise UserError(
            f"response_format: the schema joins schemas, by allOf or beside anyOf, oneOf or $ref, "
            f"and has {len(patterns)} patterns and formats, too many or too long to hold together; "
            "shorten them, or do not join"
        )


class Grammar:
    """What has been written of one answer, and what may follow; not for several threads at once.

    Args:
        matcher: llguidance's `LLMatcher`.
        words: the size of its bits.
    """

    def __init__(self, matcher: Any, words: int) -> None:
        self._matcher, self._words = matcher, words

    def allowed(self) -> np.ndarray:
        """The tokens that may come next, as bits: (words,), int32."""
        from llguidance.numpy import fill_next_token_bitmask

        bits = np.zeros((1, self._words), np.int32)
        fill_next_token_bitmask(self._matcher, bits)
        return bits[0]

    def take(self, token: int) -> bool:
        """Goes on by a token; returns whether the grammar could, which has bounds."""
        return self._matcher.consume_token(token) and not self._matcher.is_error()

    def copy(self) -> Grammar:
        """The same for another answer."""
        return Grammar(self._matcher.deep_copy(), self._words)


class Grammars:
    """The grammars of a tokenizer.

    Args:
        vocabulary: the number of tokens that the model knows.
        end: the token that ends an answer, which follows its JSON.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, vocabulary: int, end: int) -> None:
        self._tokenizer, self._vocabulary, self._end = tokenizer, vocabulary, end
        self._making = threading.Lock()

    @cached_property
    def _read(self) -> Any:
        from llguidance import LLTokenizer

        return LLTokenizer(self._tokenizer.to_str(), n_vocab=self._vocabulary, eos_token=self._end)

    def of(self, schema: dict[str, Any]) -> Grammar:
        """The grammar of a JSON schema.

        Raises:
            UserError: the schema or the tokenizer is of a kind that llguidance does not support, or
                the schema's patterns would take too much work.
            MissingPackageError: llguidance is not installed.
        """
        with needed("response_format", "llguidance", "serve"):
            from llguidance import LLMatcher
        _check_patterns(schema)
        try:
            with self._making:
                tokenizer = self._read
        except ValueError as error:
            raise UserError(
                f"response_format: the tokenizer has no bytes as tokens ({error}); leave it out"
            ) from error
        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, defaults=_SPACES)
        except ValueError as error:
            raise UserError(f"response_format: {shortened(str(error), 300)}") from error
        matcher = LLMatcher(tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise UserError(f"response_format: {shortened(matcher.get_error(), 300)}")
        return Grammar(matcher, -(-self._vocabulary // 32))
