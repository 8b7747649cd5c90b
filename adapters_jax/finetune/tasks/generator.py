"""A finished run that generates: completions of prompts, and replies in conversations."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from adapters_jax.finetune.data.prompts import Prompts
from adapters_jax.finetune.models.generation import check_length
from adapters_jax.finetune.pretrained.decoder import PretrainedDecoder, complete
from adapters_jax.transforms.prompting import virtual_tokens

BATCH_SIZE = 16  # prompts completed at a time
NEW_TOKENS = 128


@dataclass(frozen=True)
class Generator:
    """A run that is ready to generate; `adapters_jax.finetune.inference.load_generator` makes it.

    Attributes:
        decoder: the base.
        model: the adapted model.
        prompts: the format of prompts in training, which is used here, too.
        stop: ids of tokens that end a completion, beside the decoder's own.

    Example:
        >>> from adapters_jax.finetune.inference import load_generator
        >>> generator = load_generator("runs/restaurants")  # doctest: +SKIP
        >>> for text in generator.generate(["name: Aromi, food: Thai"]):  # doctest: +SKIP
        ...     print(text)
        Aromi serves Thai food.
    """

    decoder: PretrainedDecoder
    model: nnx.Module
    prompts: Prompts
    stop: tuple[int, ...] = ()

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[str]:
        """Generates the completion of each prompt, batch by batch.

        Args:
            prompts: the prompts, as in the column that the run was trained on.
            max_new_tokens: the largest number of tokens to generate; by default 128, or fewer where
                the model has no positions for more.
            temperature: 0 takes the likeliest token; otherwise logits are divided by it.
            top_p: sample among the likeliest tokens whose probabilities add up to this, above 0 and
                at most 1.
            seed: the seed of sampling.

        Yields:
            The text of each completion, without its prompt, in the order of the prompts.

        Raises:
            UserError: an argument is out of range, or a prompt and its new tokens are longer than
                the model's longest text.
        """
        encoded = [self.prompts.encode(prompt, self.decoder) for prompt in prompts]
        if not encoded:
            return
        tokens = self._room(encoded, max_new_tokens)
        for first in range(0, len(prompts), BATCH_SIZE):
            some = encoded[first : first + BATCH_SIZE]
            yield from self._complete(some, tokens, temperature, top_p, seed, first)

    def reply(
        self,
        messages: Sequence[Mapping[str, Any]],
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        tools: Sequence[Any] | None = None,
    ) -> str:
        """Generates the assistant's next message of a conversation.

        Args:
            messages: the messages so far, each with a `role` and a `content`.
            max_new_tokens, temperature, top_p, seed: as for `generate`.
            tools: the JSON schemas of the functions that the assistant may call.

        Returns:
            The text of the message.

        Raises:
            UserError: as for `generate`, or the base has no chat template.
            ChatTemplateError: the template rejects the messages.
        """
        text, _ = self.decoder.render(messages, True, tools)
        ids = self.decoder.encode(text).ids
        tokens = self._room([ids], max_new_tokens)
        (answer,) = self._complete([ids], tokens, temperature, top_p, seed, len(messages))
        return answer

    def _complete(
        self,
        prompts: Sequence[Sequence[int]],
        tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        draw: int,
    ) -> list[str]:
        """The completions of a batch; `draw` numbers what is sampled by one seed."""
        key = jax.random.fold_in(jax.random.key(seed), draw)
        sampling = {"temperature": temperature, "top_p": top_p, "key": key}
        return complete(self.model, self.decoder, prompts, tokens, self.stop, **sampling)

    def _room(self, encoded: Sequence[Sequence[int]], new_tokens: int | None) -> int:
        """The largest number of new tokens; raises UserError if the model cannot read as many."""
        virtual = virtual_tokens(vars(self.model).get("adapter_recipe", ()))
        lengths = [virtual + len(ids) for ids in encoded]
        if new_tokens is None:
            room = self.decoder.config.longest - max(lengths)
            new_tokens = max(1, min(NEW_TOKENS, room))
        check_length(self.model, lengths, new_tokens)
        return new_tokens
