"""Requests, the adapters that they name, and the sizes and counts of what computes them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from adapters_jax.errors import UserError, check_size
from adapters_jax.finetune.serving.choosing import Choice, Likely, Token
from adapters_jax.transforms.fitting import Fitted

End = Literal["stop", "length", "cancelled", "timeout", "not finite", "stuck", "closed"]

CLOSING = "the server is shutting down; try another one"


class BusyError(UserError):
    """The queue is full, or the engine is closing; the request may come again later."""


class UnknownModelError(UserError):
    """No adapter has this name."""


class FullError(UserError):
    """There are as many adapters as can be named."""


class Sink(Protocol):
    """What takes the tokens of a request; the engine's thread calls it, so it must be quick."""

    def token(self, token: int) -> bool:
        """Takes the next token, and returns whether to go on."""

    def end(self, why: End) -> None:
        """Is told once that there are no more tokens, and why."""


class Rule(Protocol):
    """What a request's tokens must follow; the engine's thread asks it from token to token."""

    def allowed(self) -> np.ndarray:
        """The tokens that may come next, as bits: (vocab / 32,), int32."""

    def take(self, token: int) -> bool:
        """Goes on by a token; returns whether it could."""


@dataclass(frozen=True)
class Served:
    """An adapter that requests can name.

    Attributes:
        fitted: what `fit` made of it.
        about: what it is.
    """

    fitted: Fitted
    about: Any


@dataclass
class Scores:
    """What a request wants to know of its tokens; the engine's thread adds to it.

    Args:
        prompt: whether log-probabilities of the prompt's tokens are wanted, too; it is read anew
            then.
        top: whether the likeliest tokens at each position are.

    Attributes:
        made: each new token with its log-probability, before the sink gets it.
        given: of the prompt's tokens from the second on, piece by piece: their log-probabilities,
            and the likeliest tokens there.

    Example:
        >>> scores = Scores(top=True)  # for engine.submit(prompt, sink, scores=scores, ...)
        >>> scores.made.append(Token(7, True, -0.5, Likely([7, 3], [-0.5, -1.2])))
        >>> [(token.id, token.logprob) for token in scores.made]
        [(7, -0.5)]
    """

    prompt: bool = False
    top: bool = False
    made: list[Token] = field(default_factory=list)
    given: list[tuple[Any, Likely]] = field(default_factory=list)


@dataclass(eq=False)
class Request:
    """A prompt on its way; `Engine.submit` makes it.

    Attributes:
        prompt: the ids of the prompt's tokens.
        adapter: what `fit` made of its adapter; None is the base.
        most: the largest number of new tokens.
        choice: how tokens are chosen.
        stop: ids of tokens that end it.
        sink: takes its tokens.
        deadline: when it ends in any case, in seconds of `time.monotonic`.
        read: how many tokens of the prompt are read.
        made: the number of new tokens.
        last: the id of the token before the next one.
        cancelled: whether nobody waits for it any more.
        start: the first token of the prompt that its adapter acts on; their number where none is.
        scores: takes the log-probabilities of its tokens; None if nobody wants them.
        rule: what its tokens must follow; None if nothing.

    Example:
        >>> request = Request([5, 7], None, 3, Choice(), frozenset({2}), sink=None, deadline=60.0)
        >>> len(request.prompt), request.read, request.made, request.cancelled
        (2, 0, 0, False)
    """

    prompt: Sequence[int]
    adapter: Fitted | None
    most: int
    choice: Choice
    stop: frozenset[int]
    sink: Sink
    deadline: float
    read: int = 0
    made: int = 0
    last: int = 0
    cancelled: bool = False
    start: int = 0
    scores: Scores | None = None
    rule: Rule | None = None

    @property
    def acts(self) -> bool:
        """Whether the adapter acts on new tokens, as on the prompt's last one."""
        return self.start < len(self.prompt)

    @property
    def choosing(self) -> Choice:
        """How the next token is chosen."""
        top = self.scores is not None and self.scores.top
        return self.choice._replace(step=self.made, top=int(top))

    @property
    def beginning(self) -> tuple[Sequence[int], Fitted | None, list[bool]]:
        """What another row may have read: tokens, their adapter, and on which of them it acts.

        The prompt's last token gives the first new one, so it is read in any case.
        """
        ids = self.prompt[:-1]
        return ids, self.adapter, [i >= self.start for i in range(len(ids))]

    @property
    def ways(self) -> tuple[Fitted | None, Choice]:
        """Its adapter, and how its next token is chosen."""
        return self.adapter, self.choosing

    @property
    def allowed(self) -> np.ndarray | None:
        """The tokens that may come next, as bits; None for all."""
        return None if self.rule is None else self.rule.allowed()


@dataclass(frozen=True)
class Sizes:
    """The sizes of an engine.

    Args:
        rows: how many requests are computed at a time.
        context: the largest number of tokens of a request, prompt and completion together.
        pieces: the sizes of the parts that prompts are read in, ascending; with 1 among them, a
            request that is alone does not pay for the rows of others.
        queue: how many further requests wait.
        adapters: how many adapters can be named at a time.

    Raises:
        UserError: a size is no positive whole number, or `pieces` do not ascend.

    Example:
        >>> Sizes(rows=2, context=256)
        Sizes(rows=2, context=256, pieces=(1, 16, 64), queue=64, adapters=64)
        >>> Sizes(rows=0)
        Traceback (most recent call last):
        adapters_jax.errors.UserError: Sizes: rows=0, expected a whole number >= 1
    """

    rows: int = 8
    context: int = 1024
    pieces: tuple[int, ...] = (1, 16, 64)
    queue: int = 64
    adapters: int = 64

    def __post_init__(self) -> None:
        for name in ("rows", "context", "queue", "adapters"):
            check_size("Sizes", name, getattr(self, name))
        if not self.pieces or list(self.pieces) != sorted({*self.pieces}) or self.pieces[0] < 1:
            raise UserError(
                f"Sizes: pieces={self.pieces}, expected ascending numbers such as (1, 16, 64)"
            )


@dataclass
class Counts:
    """What an engine has done so far; numbers only grow, but for those of now.

    Of the tokens of prompts, `reused_tokens` were read for an earlier request.
    """

    ended: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    reused_tokens: int = 0
    tokens: int = 0
    steps: int = 0
    changes: int = 0


def check_request(
    prompt: Sequence[int], most: int, choice: Choice, context: int, vocabulary: int
) -> None:
    """Raises UserError if no engine of this context and vocabulary can complete a prompt."""
    if not prompt:
        raise UserError("the prompt is empty; expected at least one token")
    unknown = [token for token in prompt if not 0 <= token < vocabulary]
    if unknown:
        raise UserError(f"the prompt has the token {unknown[0]}, expected 0 to {vocabulary - 1}")
    if most < 0 or len(prompt) + most > context:
        raise UserError(
            f"the prompt has {len(prompt)} tokens and {most} new ones are asked for, expected "
            f"no negative number and at most {context} together; shorten the prompt or "
            "ask for fewer"
        )
    biased = [token for token, _ in choice.bias if not 0 <= token < vocabulary]
    if biased:
        raise UserError(f"the bias is of the token {biased[0]}, expected 0 to {vocabulary - 1}")
