"""Masked language modelling: an encoder predicts tokens that are hidden, in texts of a language.

It trains language and domain adapters. The texts are packed into blocks of `--max-length` tokens.
Each step hides 15 % of a block's tokens anew, by a key of the seed and the step: of ten, eight
become the mask token, one a random token, and one stays. Dev and test hide the same tokens always.
A checkpoint's own head stays frozen; where it has none, a new head trains.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from jaxtyping import Array, Float, Int

from adapters_jax.errors import UserError
from adapters_jax.finetune.data.batches import LEAST, NOTHING, Batches, bare
from adapters_jax.finetune.data.datasets import TaskData
from adapters_jax.finetune.data.mixing import Mixture
from adapters_jax.finetune.data.readers import DataError
from adapters_jax.finetune.data.tables import Table, read_rows
from adapters_jax.finetune.formats.base import MASKED
from adapters_jax.finetune.pretrained.encoder import INPUTS, Encoder
from adapters_jax.finetune.tasks.base import Batch, Columns
from adapters_jax.finetune.tasks.labelled import EncoderTask
from adapters_jax.finetune.tasks.labelled_problem import LabelledProblem
from adapters_jax.finetune.tasks.metrics import perplexity
from adapters_jax.finetune.tasks.prediction import Prediction
from adapters_jax.finetune.tasks.readout import Inputs, TokenReadout, learnt_losses
from adapters_jax.presets import HEAD

SHARE = 0.15  # of tokens that are hidden
SHOWN = 5  # tokens that a prediction has for each mask
MASK = "[MASK]"  # in texts to predict, for every model
_OF_MODELS = (MASK, "<mask>")


class Block(NamedTuple):
    """A part of the texts, whose tokens are hidden in training; a `Row` has masks to fill in."""

    input_ids: np.ndarray
    token_type_ids: np.ndarray


class Hidden(NamedTuple):
    """A row with hidden tokens: what the model reads, where they are, and what they were."""

    input_ids: Int[np.ndarray, " length"]
    positions: Int[np.ndarray, " tokens"]
    labels: Int[np.ndarray, " tokens"]


class Vocabulary(NamedTuple):
    """The tokens that hiding needs.

    Attributes:
        special: the tokens that are never hidden, such as `[CLS]`.
    """

    size: int
    mask: int
    special: Int[np.ndarray, " tokens"]

    @classmethod
    def of(cls, encoder: Encoder) -> Self:
        """That of an encoder; raises UserError if its tokenizer has no mask token."""
        tokenizer = encoder.tokenizer
        added = tokenizer.get_added_tokens_decoder()
        special = {i for i, token in added.items() if token.special}
        for ends in _ends(tokenizer):
            special |= {*ends}
        size = min(tokenizer.get_vocab_size(), encoder.config.vocab_size)
        mask: Any = tokenizer.token_to_id(_mask_of(tokenizer))
        if mask >= encoder.config.vocab_size:
            raise UserError(
                f"the tokenizer's mask is token {mask}, and the base has embeddings of "
                f"{encoder.config.vocab_size} tokens; give a base and its own tokenizer"
            )
        return cls(size, mask, np.array(sorted({*special, mask})))


def _mask_of(tokenizer: tokenizers.Tokenizer) -> str:
    found = next((each for each in _OF_MODELS if tokenizer.token_to_id(each) is not None), None)
    if found is None:
        raise UserError(
            f"the base's tokenizer has no {' or '.join(_OF_MODELS)}, which hidden tokens become; "
            "give a masked language model, such as google-bert/bert-base-uncased"
        )
    return found


def _ends(tokenizer: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens before and behind a text."""
    found = bare(tokenizer).encode("a")
    inside = [i for i, special in enumerate(found.special_tokens_mask) if not special]
    first, last = (inside[0], inside[-1]) if inside else (len(found.ids) // 2,) * 2
    return found.ids[:first], found.ids[last + 1 :] if inside else found.ids[first:]


def hide(ids: Int[np.ndarray, " length"], vocabulary: Vocabulary, seed: Sequence[int]) -> Hidden:
    """Hides 15 % of a row's tokens, at least one, as BERT's pre-training does.

    Args:
        vocabulary: the mask token, and what is never hidden.
        seed: what the choice is a pure function of.

    Reference:
        Devlin et al. 2018, arXiv:1810.04805, section 3.1.

    Example:
        >>> hidden = hide(np.arange(20), Vocabulary(50, 49, np.array([0, 19])), [0])
        >>> len(hidden.positions), hidden.labels.tolist() == hidden.positions.tolist()
        (3, True)
    """
    draw = np.random.default_rng(seed)
    (able,) = np.nonzero(~np.isin(ids, vocabulary.special))
    count = min(len(able), max(1, round(SHARE * len(able))))
    positions = np.sort(draw.choice(able, count, replace=False))
    fate, shown = draw.random(count), np.array(ids)
    other = draw.integers(0, vocabulary.size, count)
    shown[positions[fate < 0.8]] = vocabulary.mask
    random = fate >= 0.9
    shown[positions[random]] = other[random]
    return Hidden(shown, positions, np.asarray(ids)[positions])


class MaskedBatches(Batches):
    """`Batches` of blocks, whose tokens each step hides anew, or of rows with masks to fill in.

    Args:
        rows: the blocks, or the rows with masks.
        options: the other arguments of `Batches`, without the labels.
    """

    def __init__(self, rows: Sequence[Any], vocabulary: Vocabulary, *options: Any) -> None:
        super().__init__(rows, None, *options)
        self.vocabulary = vocabulary
        self._hides = isinstance(rows[0], Block)
        masks = max(int((row.input_ids == vocabulary.mask).sum()) for row in rows)
        self.most = max(1, round(SHARE * self.buckets[-1])) if self._hides else masks

    def _hidden(self, step: int, place: int, number: int, ids: np.ndarray) -> Hidden:
        """The hidden tokens of the row with a number, at a place of the batch of a step."""
        if self._hides:
            seed = [number] if self.seed is None else [self.seed, step, place]
            return hide(ids, self.vocabulary, seed)
        masks = np.flatnonzero(ids == self.vocabulary.mask)
        return Hidden(ids, masks, np.full(len(masks), NOTHING))

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        batch, rows = super().__getitem__(step), self.rows_of(step)
        ids = batch["input_ids"]
        # As many places in every batch, so that all have one shape; those left over have no label.
        positions = np.zeros((len(rows), self.most), np.int32)
        labels = np.full_like(positions, NOTHING)
        for place, number in enumerate(rows.tolist()):
            length = len(self.rows[number].input_ids)
            found = self._hidden(step, place, number, ids[place, :length])
            ids[place, :length] = found.input_ids
            positions[place, : len(found.positions)] = found.positions
            labels[place, : len(found.labels)] = found.labels
        return {**batch, "positions": positions, "labels": labels}


@dataclass(frozen=True)
class MaskPrediction(Prediction):
    """The tokens of a text's masks.

    Attributes:
        filled: the text with the most probable token of each mask.
        tokens: the most probable tokens of each mask, the best first.
        probabilities: their probabilities.
    """

    filled: str
    tokens: list[list[str]]
    probabilities: list[list[float]]

    def cells(self) -> dict[str, str]:
        """The filled text, and the probability of each token in it."""
        best = zip(self.tokens, self.probabilities, strict=True)
        return {
            "filled": self.filled,
            "probabilities": ", ".join(f"{names[0]} {shares[0]:.4f}" for names, shares in best),
        }


@dataclass(frozen=True)
class MaskedTokens(TokenReadout):
    """A `Readout` of hidden tokens: the outputs are logits over the vocabulary for each of them."""

    constant_title = "unigram"
    pooling = MASKED
    arrays = (*INPUTS, "positions")
    width = 1

    @classmethod
    def of(cls, train: Table, setup: Any = None) -> Self:
        """Needs nothing of a training set."""
        return cls()

    def encoded(self, encoder: Encoder, texts: Sequence[Any], max_length: int) -> Inputs:
        """Packs texts into blocks, the special token between texts that a text ends with."""
        encoder.check_length(max_length)
        before, behind = _ends(encoder.tokenizer)
        size, least = max_length - len(before) - len(behind), max(LEAST, len(before + behind) + 1)
        if max_length < least:
            raise UserError(f"--max-length {max_length}: expected at least {least}")
        tokenizer = bare(encoder.tokenizer)
        found = tokenizer.encode_batch([text for text, _ in texts], add_special_tokens=False)
        stream = np.concatenate([np.array([*each.ids, *behind], np.int32) for each in found])
        stream = stream[: len(stream) - len(behind)]
        if np.isin(stream, Vocabulary.of(encoder).special).all():
            raise DataError(
                "no text has a token that can be hidden; train, dev and test need words that the "
                "tokenizer knows"
            )
        parts = [stream[i : i + size] for i in range(0, len(stream), size)]
        blocks = [np.concatenate([before, part, behind]).astype(np.int32) for part in parts]
        return Inputs([Block(block, np.zeros_like(block)) for block in blocks], 0)

    def inputs(self, encoder: Encoder, texts: Sequence[Any], max_length: int) -> Inputs:
        """Encodes texts with masks; `where` has the tokenizer, and the number of masks of each."""
        vocabulary, own = Vocabulary.of(encoder), _mask_of(encoder.tokenizer)
        named = [(text.replace(MASK, own), pair) for text, pair in texts]
        found, cut = encoder.encode(named, max_length)
        counts = [int((row.input_ids == vocabulary.mask).sum()) for row in found]
        asked = [text.count(own) for text, _ in named]
        lacking = [i for i, n in enumerate(counts, 1) if not n or n < asked[i - 1]]
        if lacking:
            raise DataError(
                f"text {lacking[0]} has no {MASK} to fill in, or one beyond {max_length} tokens; "
                f"write it for each word to predict, as in 'The film was {MASK}.'"
            )
        return Inputs(found, cut, (encoder.tokenizer, counts))

    def owners(self, inputs: Inputs) -> np.ndarray:
        """None: raises UserError."""
        raise UserError(
            "--mix: the texts of --task masked-language-modelling are joined to blocks, so that no "
            "block is of one data set; leave it out"
        )

    def batches(
        self,
        encoder: Encoder,
        rows: Sequence[Any],
        labels: Any,
        *plan: Any,
        mix: Mixture | None = None,
    ) -> MaskedBatches:
        """Batches of blocks with hidden tokens, or of rows with masks; they are not mixed."""
        return MaskedBatches(rows, Vocabulary.of(encoder), *plan, encoder.config.pad_token_id)

    def reduced(
        self, outputs: Float[Array, "rows tokens vocab"], batch: Batch
    ) -> Float[Array, "rows tokens 3"]:
        """Of each place its loss, whether its token is found, and whether one is hidden there."""
        labels = jnp.asarray(batch["labels"])
        found = [learnt_losses(outputs, labels), outputs.argmax(-1) == labels, labels != NOTHING]
        return jnp.stack([each.astype(jnp.float32) for each in found], axis=-1)

    def shown(self, outputs: Float[Array, "rows tokens vocab"]) -> Float[Array, "rows tokens n 2"]:
        """The most probable tokens and their probabilities."""
        count = min(SHOWN, outputs.shape[-1])
        shares, tokens = jax.lax.top_k(jax.nn.softmax(outputs), count)
        return jnp.stack([tokens.astype(jnp.float32), shares], axis=-1)

    def decode(self, outputs: np.ndarray, where: Any = None) -> np.ndarray:
        """What `reduced` computed, as it is."""
        return outputs

    def score(self, metrics: Sequence[str], predictions: Any, labels: Any) -> dict[str, float]:
        """The mean loss of a hidden token, its exponential, and the fraction that is found."""
        losses, right, hidden = np.asarray(predictions, np.float64).reshape(-1, 3).T
        count = int(hidden.sum())
        found = {
            "perplexity": perplexity(float(losses.sum()), count),
            "loss": float(losses.sum() / count),
            "accuracy": float((right * hidden).sum() / count),
        }
        return {name: found[name] for name in metrics}

    def judged(self, part: Any, outputs: np.ndarray, where: Any = None) -> list[dict[str, Any]]:
        """None: a block of several texts is no row of anybody's."""
        return []

    def untrained(self, problem: LabelledProblem, data: TaskData, part: str) -> np.ndarray:
        """Of each hidden token its loss by how often it is in training, each counted once more."""
        whole: Any = problem.train
        seen = np.concatenate([row.input_ids for row in whole.rows])
        size = len(problem.params[HEAD]["bias"])
        counts = np.bincount(seen, minlength=size) + 1.0
        special = whole.vocabulary.special  # a tokenizer may have more tokens than the base
        counts[special[special < size]] = 1e-9  # these are never hidden
        losses = np.log(counts.sum()) - np.log(counts)
        labels = np.concatenate([b["labels"][b["weight"] > 0] for b in problem.held_out[part]])
        labels = labels[labels != NOTHING]
        return np.stack([losses[labels], labels == counts.argmax(), np.ones(len(labels))], axis=1)

    def predictions(self, texts: Any, outputs: np.ndarray, where: Any = None) -> list[Prediction]:
        """The best tokens of each mask."""
        tokenizer, counts = where
        found: list[Prediction] = []
        for (text, pair), row, count in zip(texts, outputs, counts, strict=True):
            ids = row[:count, :, 0].astype(int).tolist()
            tokens = [[tokenizer.decode([i]).strip() for i in best] for best in ids]
            filled = text.replace(_mask_of(tokenizer), MASK)
            for best in tokens:
                filled = filled.replace(MASK, best[0], 1)
            found.append(MaskPrediction(text, pair, filled, tokens, row[:count, :, 1].tolist()))
        return found


class MaskedLanguageModelling(EncoderTask):
    """Hidden tokens of texts."""

    name = "masked-language-modelling"
    pipeline = "fill-mask"
    head = "masked_lm"
    metrics = ("perplexity", "loss", "accuracy")
    least_steps = 0  # its head is the checkpoint's
    columns: ClassVar[Columns] = {"text": "text"}
    readout = MaskedTokens
    sample = (f"The film was {MASK}.",)
    example = "--train texts.txt, or --train rows.csv --text COLUMN"

    def read(self, path: Path, columns: Mapping[str, Any], metrics: Sequence[str]) -> Table:
        """Reads texts."""
        table = read_rows(path, columns["text"], None, None)
        return replace(table, labels=[None] * len(table))
