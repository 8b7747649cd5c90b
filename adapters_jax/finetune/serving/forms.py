"""The JSON of answers, as OpenAI's."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from adapters_jax.finetune.serving.answers import Answer
from adapters_jax.finetune.serving.requests import Scores
from adapters_jax.finetune.serving.texts import offsets_of


class Form:
    """The JSON of a request's answers.

    Args:
        model: the name of the model, as the request has it.
        chat: whether they answer a conversation.
        decode: a tokenizer's method, which gives the text of tokens.
        likeliest: how many of the likeliest tokens are shown with log-probabilities.
        echo: whether the text of a prompt is in front of its answer's.
        calls: splits an answer into its text and its calls of tools; None if there are no tools.
    """

    def __init__(
        self,
        model: str,
        chat: bool,
        decode: Callable[..., str],
        likeliest: int,
        echo: bool,
        calls: Callable[[str], tuple[str, list[Any]]] | None = None,
    ) -> None:
        self._chat, self._decode, self._likeliest, self._echo = chat, decode, likeliest, echo
        self.calls = calls
        self._head = {"created": int(time.time()), "model": model}
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Whole answers."""
        return {**self._of([self._choice(each) for each in answers]), **usage(answers)}

    def _choice(self, answer: Answer) -> dict[str, Any]:
        seen = None if answer.scores is None else self._logprobs(answer, answer.scores)
        message, why = self._message(answer)
        said = {"message": message} if self._chat else {"text": self.before(answer) + answer.text}
        return {"index": answer.index, **said, "logprobs": seen, "finish_reason": why}

    def _message(self, answer: Answer) -> tuple[dict[str, Any], str]:
        """An answer as a message, and the reason of its end."""
        text, calls = (answer.text, []) if self.calls is None else self.calls(answer.text)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if not calls:
            return message, answer.why
        return {**message, "content": text.strip() or None, "tool_calls": calls}, "tool_calls"

    def before(self, answer: Answer) -> str:
        """The text in front of an answer."""
        return self._decode(answer.ids) if self._echo else ""

    def _logprobs(self, answer: Answer, scores: Scores) -> dict[str, Any]:
        """The log-probabilities of tokens, and of the likeliest ones in their places."""
        made = scores.made[: answer.tokens]
        ids = [token.id for token in made]
        own: list[float | None] = [token.logprob for token in made]
        tops: list[dict[str, float] | None] = [
            self._top(token.top.ids, token.top.logprobs) for token in made
        ]
        if self._echo:  # nothing comes before the first token
            given = [each for piece, _ in scores.given for each in piece.tolist()]
            likely = [pair for _, top in scores.given for pair in zip(*top, strict=True)]
            ids, own = [*answer.ids, *ids], [None, *given, *own]
            tops = [None, *(self._top(*pair) for pair in likely), *tops]
        texts = [self._shown(each) for each in ids]
        if not self._chat:
            return {
                "tokens": texts,
                "token_logprobs": own,
                "top_logprobs": tops,
                "text_offset": offsets_of(ids, self._decode),
            }

        def one(text: str, logprob: float | None) -> dict[str, Any]:
            return {"token": text, "logprob": logprob, "bytes": [*text.encode()]}

        rows = [
            {**one(*pair), "top_logprobs": [one(*each) for each in (top or {}).items()]}
            for pair, top in zip(zip(texts, own, strict=True), tops, strict=True)
        ]
        return {"content": rows, "refusal": None}

    def _shown(self, token: int) -> str:
        """A token as a text; special ones too, which are not in the texts of answers."""
        return self._decode([token], skip_special_tokens=False)

    def _top(self, ids: np.ndarray, logprobs: np.ndarray) -> dict[str, float]:
        shown: dict[str, float] = {}
        for i, logprob in zip(ids.tolist()[: self._likeliest], logprobs.tolist(), strict=False):
            shown.setdefault(self._shown(i), logprob)  # parts of characters look the same
        return shown

    def piece(self, answer: Answer, text: str, why: str | None = None) -> dict[str, Any]:
        """A piece of an answer."""
        delta = {"role": "assistant", "content": text} if text else {}
        said = {"delta": delta} if self._chat else {"text": text}
        choice = {"index": answer.index, "logprobs": None, **said, "finish_reason": why}
        return self._of([choice], ".chunk")

    def ends(self, answer: Answer) -> list[dict[str, Any]]:
        """The pieces at the end of an answer; calls of tools are only known there."""
        if self.calls is None:
            return [self.piece(answer, "", answer.why)]
        delta, why = self._message(answer)
        calls = delta.get("tool_calls", [])
        if calls:
            delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(calls)]
        whole = self.piece(answer, "")
        whole["choices"][0]["delta"] = delta
        return [whole, self.piece(answer, "", why)]

    def counted(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The last piece of a stream, which has no answer."""
        return {**self._of([], ".chunk"), **usage(answers)}

    def _of(self, choices: list[Any], part: str = "") -> dict[str, Any]:
        kind = f"chat.completion{part}" if self._chat else "text_completion"
        return {"id": self._id, "object": kind, **self._head, "choices": choices}


def usage(answers: Sequence[Answer]) -> dict[str, Any]:
    """The numbers of tokens; answers to one prompt share it.

    Example:
        >>> twice = [Answer(i, ids, 8, None, tokens=4) for ids in ([1, 2], [3]) for i in range(2)]
        >>> usage(twice)["usage"]
        {'prompt_tokens': 3, 'completion_tokens': 16, 'total_tokens': 19}
    """
    prompts = {id(each.ids): len(each.ids) for each in answers}
    given, made = sum(prompts.values()), sum(each.tokens for each in answers)
    counts = {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made}
    return {"usage": counts}
