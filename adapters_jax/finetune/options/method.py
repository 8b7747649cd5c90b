"""The flags that choose a recipe, for every command that takes one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from adapters_jax.errors import FileSystemError, UserError, file_errors, shown
from adapters_jax.finetune.options.flags import flag, given

if TYPE_CHECKING:
    from adapters_jax.recipe import Recipe

HEAD_ONLY = "head-only"
DEFAULT, ON_DECODERS = "houlsby", "lora"  # the method where none is named
# Not the tables and what stands beside them, nor routers and gates of a few outputs.
_OTHERS = "{embeddings|position_embeddings|position_bias|embedding_projection|head_projection|head"
_OTHERS += "|router|shared_gate|beta|decay|beta_decay|gate_up_bias|output_bias}"
LINEAR: dict[str, Any] = {"targets": ("**", f"!**/{_OTHERS}/**"), "rank": 16, "alpha": 32.0}
WIDEST = 64  # the width m of bottlenecks up to which the learning rates of the presets hold


@dataclass(frozen=True)
class Preset:
    """A value of `--method`: the recipe it makes, its flags, and the defaults of its training.

    Attributes:
        make: makes the recipe from the values of the flags.
        flags: the fields of `MethodOptions` that the method takes.
        learning_rate: the default learning rate.
        epochs: the default number of epochs.
        head_learning_rate: the default learning rate of the head, which starts from random values;
            None for the learning rate of the rest. At 1e-3, adapters find no entity in WNUT-17
            after 12 epochs of 900 rows; see `python -m benchmarks defaults`, which tries both.
        dropout: the default dropout of the base model; None for the checkpoint's own.
        paper: the number on arXiv of the paper of the recipe; by default those of its methods.
    """

    make: Callable[..., Recipe]
    flags: tuple[str, ...]
    learning_rate: float
    epochs: float = 3.0
    head_learning_rate: float | None = 1e-2
    dropout: float | None = 0.0
    paper: str = ""


def _published(name: str) -> Callable[..., Recipe]:
    """The function of `presets` with this name, which is imported at the first call."""

    def make(*arguments: Any, **fields: Any) -> Recipe:
        from adapters_jax import presets

        return getattr(presets, name)(*arguments, **fields)

    return make


def _llama_adapter(*, layer: str, num_layers: int, last: int | None = None, **fields: Any):
    """Prompts in all layers but the lowest two, as in the paper."""
    last = max(num_layers - 2, 1) if last is None else last
    targets = f"{layer}/attention"
    return _published("llama_adapter")(last=last, num_layers=num_layers, targets=targets, **fields)


def _prefix_tuning(*, layer: str, num_layers: int, last: int | None = None, **fields: Any):
    """Prompts in all layers, as in the paper."""
    fields["length"] = fields.pop("prompt_length", 20)
    last, targets = last or num_layers, f"{layer}/attention"
    return _published("prefix_tuning")(last=last, num_layers=num_layers, targets=targets, **fields)


def _prompt_tuning(*, prompt_length: int = 20, **fields: Any):
    """Virtual tokens, whose placeholders the command puts in front of each row."""
    return _published("prompt_tuning")(prompt_length, **fields)


def _loreft(*, layer: str, num_layers: int, **fields: Any):
    """Edits of what all layers return, or the top ones."""
    return _published("loreft")(num_layers=num_layers, targets=layer, **fields)


_ADDED: tuple[str, ...] = ("targets", "adapter_dropout")
_PROMPT = ("prompt_length", "last", "init_std")
_ADALORA = (*_ADDED, "rank", "alpha", "rank_stabilized", "rank_pattern", "alpha_pattern")
_BOTTLENECK = (*_ADDED, "bottleneck_dim", "reduction_factor", "activation", "init_std", "scale")
_LORA = (*_ADDED, "rank", "alpha", "a_init", "rank_stabilized")
_PATTERNS = ("rank_pattern", "alpha_pattern")
_LORA += (*_PATTERNS, "dora", "invocation", "bias")
_LOHA = ("targets", "rank", "alpha", *_PATTERNS)
_LOREFT = ("rank", "prefix_positions", "suffix_positions", "last", "adapter_dropout")

PRESETS = {
    "houlsby": Preset(_published("houlsby"), (*_BOTTLENECK, "layer_norms"), 2e-3),
    "pfeiffer": Preset(_published("pfeiffer"), _BOTTLENECK, 2e-3, paper="2005.00247"),
    "parallel": Preset(_published("parallel"), _BOTTLENECK, 2e-3, paper="2110.04366"),
    "compacter": Preset(_published("compacter"), (*_BOTTLENECK, "phm_dim"), 3e-3),
    "lora": Preset(_published("lora"), _LORA, 2e-3),
    "loha": Preset(_published("loha"), _LOHA, 2e-3),
    "lokr": Preset(_published("lokr"), (*_LOHA, "factor"), 2e-3),
    "oft": Preset(_published("oft"), ("targets", "block", "terms"), 2e-3),
    "vera": Preset(_published("vera"), (*_ADDED, "rank", "d_initial"), 1e-2),
    "ia3": Preset(_published("ia3"), ("targets", "feed_forward"), 5e-3),
    "loreft": Preset(_loreft, _LOREFT, 1e-3),
    "adalora": Preset(_published("adalora"), _ADALORA, 2e-3),
    "llama-adapter": Preset(_llama_adapter, (*_PROMPT, "gate", "gate_activation"), 9e-3),
    "prefix-tuning": Preset(_prefix_tuning, _PROMPT, 9e-3),
    "prompt-tuning": Preset(_prompt_tuning, ("targets", "prompt_length", "init_std"), 1e-2),
    "bitfit": Preset(_published("bitfit"), (), 2e-3, paper="2106.10199"),
    "layer-norms": Preset(_published("layer_norms"), (), 2e-3),
    "last-layers": Preset(
        lambda layers=2, **fields: _published("last_layers")(layers, **fields),
        ("layers",),
        1e-4,
        head_learning_rate=1e-3,
        dropout=None,
    ),
    "full": Preset(
        lambda head=None: _published("full")(), (), 5e-5, head_learning_rate=1e-3, dropout=None
    ),
    HEAD_ONLY: Preset(_published("head_only"), (), 1e-2, epochs=20.0, head_learning_rate=None),
}
# Methods that address layers by their numbers.
BY_NUMBER = ("last-layers", "llama-adapter", "prefix-tuning", "loreft")
# The flag by which recipes of a method differ in size.
SIZES = {
    "houlsby": "bottleneck_dim",
    "pfeiffer": "bottleneck_dim",
    "parallel": "bottleneck_dim",
    "compacter": "bottleneck_dim",
    "lora": "rank",
    "loha": "rank",
    "vera": "rank",
    "loreft": "rank",
    "adalora": "rank",
    "llama-adapter": "prompt_length",
    "prefix-tuning": "prompt_length",
    "prompt-tuning": "prompt_length",
    "last-layers": "layers",
}
if TYPE_CHECKING:
    MethodName = str
else:  # which a type checker does not read, and the command line does
    MethodName = Literal[(*PRESETS,)]


@dataclass(frozen=True)
class MethodOptions:
    """What to add to the model, and what to train of it.

    Args:
        method: a published recipe; its fields are the flags below, with the paper's defaults. By
            default houlsby, and for a decoder lora.
        recipe: a recipe as a JSON file, instead of --method and its fields.
        bottleneck_dim: width m of bottleneck adapters; 64 by default.
        reduction_factor: m as a fraction of the model's width, d / reduction_factor.
        activation: between the projections of a bottleneck: gelu, relu, silu, tanh, ...
        init_std: standard deviation of the initial bottleneck kernels, by default 0.01, or of the
            initial prompts, by default 1 for llama-adapter and 0.02 for the others.
        scale: factor on a bottleneck's output; by default 1, and 4 for parallel.
        layer_norms: pattern of the layer norms that houlsby trains; "" trains none.
        phm_dim: n of compacter, the number and size of its rules; 4 by default.
        rank: r of LoRA, LoHa and LoKr, 8 by default and 16 for lora on a decoder, of VeRA, 256, of
            loreft, 4, or at the start of adalora, 12.
        alpha: LoRA, LoHa and LoKr scale by alpha / r; by default the rank, and 32 for lora on a
            decoder.
        a_init: initial values of LoRA's A: gaussian, uniform or gaussian_rank; or pissa or olora,
            which take A and B out of the weight.
        rank_stabilized: LoRA scales by alpha / sqrt(r) instead of alpha / r.
        rank_pattern: other ranks for some targets, as PATTERN RANK PATTERN RANK ...
        alpha_pattern: other alphas for some targets, as PATTERN ALPHA PATTERN ALPHA ...
        dora: LoRA with a trained norm for every output (DoRA).
        invocation: LoRA from the last of these tokens on alone (activated LoRA): their ids, or a
            text, which the base's tokenizer reads with its control tokens.
        bias: biases that are trained with LoRA: none, all, or lora_only; none by default.
        factor: for lokr, the wanted size of the left factor; near the square roots by default.
        block: for oft, the inputs that one rotation mixes; 32 by default.
        terms: for oft, the terms of a series that stands for a matrix's inverse.
        d_initial: for vera, where the scales of the rank start; 0.1 by default.
        adapter_dropout: dropout of a bottleneck's inner activations, or of LoRA's or VeRA's input.
        targets: patterns of the modules to adapt, such as "**/{query,value}"; lora adapts these two
            by default, and of a decoder all linear layers but the output layer.
        feed_forward: for ia3, patterns of the modules whose input is scaled; by default the last
            projections of the feed-forward layers.
        layers: number of layers that last-layers trains; 2 by default.
        prompt_length: tokens in a layer's prompt, or of prompt-tuning before those of each row; 10
            for llama-adapter, 20 for the others.
        last: number of layers with prompts or loreft, from the top; by default all, for
            llama-adapter all but two.
        prefix_positions: how many of a text's first tokens loreft edits; 3 by default.
        suffix_positions: how many of its last tokens loreft edits, on an encoder; 0 by default.
        gate: for llama-adapter, one gate for each "head" or one for the "layer".
        gate_activation: for llama-adapter, tanh or identity.
    """

    method: MethodName | None = None
    recipe: Path | None = None
    bottleneck_dim: int | None = None
    reduction_factor: float | None = None
    activation: str | None = None
    init_std: float | None = None
    scale: float | None = None
    layer_norms: str | None = None
    phm_dim: int | None = None
    rank: int | None = None
    alpha: float | None = None
    a_init: str | None = None
    rank_stabilized: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    dora: bool = False
    invocation: tuple[int | str, ...] = ()
    bias: str | None = None
    factor: int | None = None
    block: int | None = None
    terms: int | None = None
    d_initial: float | None = None
    adapter_dropout: float | None = None
    targets: tuple[str, ...] = ()
    feed_forward: tuple[str, ...] = ()
    layers: int | None = None
    prompt_length: int | None = None
    last: int | None = None
    prefix_positions: int | None = None
    suffix_positions: int | None = None
    gate: str | None = None
    gate_activation: str | None = None

    @property
    def title(self) -> str:
        """The name of the method in tables and directories."""
        return (self.method or DEFAULT) if self.recipe is None else self.recipe.stem

    def on(self, kind: str) -> Self:
        """Fills in the defaults of a kind of base.

        LoRA on a decoder adapts all linear layers with alpha = 32, as in "LoRA Without Regret"
        (Schulman et al. 2025, thinkingmachines.ai/blog/lora). Rank 16 is the choice of this
        library, for the size of its files.

        Example:
            >>> MethodOptions().on("encoder").method
            'houlsby'
            >>> chosen = MethodOptions(targets=("**/mlp/*",)).on("decoder")
            >>> chosen.method, chosen.rank, chosen.alpha
            ('lora', 16, 32.0)
        """
        if self.recipe is not None:
            return self
        method = self.method or (ON_DECODERS if kind == "decoder" else DEFAULT)
        chosen = replace(self, method=method)
        if (kind, method) != ("decoder", "lora"):
            return chosen
        missing = {name: value for name, value in LINEAR.items() if name not in given(self)}
        return replace(chosen, **missing)

    @property
    def learning_rate(self) -> float:
        """The default rate: that of the preset, times sqrt(64 / m) if --bottleneck-dim is above 64.

        At m = 256, the rate of m = 64 learns nothing of CoLA: `benchmarks tradeoff-cola`.

        Example:
            >>> MethodOptions("houlsby").learning_rate
            0.002
            >>> MethodOptions("houlsby", bottleneck_dim=256).learning_rate
            0.001
        """
        width = max(self.bottleneck_dim or WIDEST, WIDEST)
        return PRESETS[self.method or DEFAULT].learning_rate * math.sqrt(WIDEST / width)

    def rate_on(self, kind: str, width: int) -> float:
        """The default rate on a base; LoRA's on a decoder falls with the width.

        It is 5e-4 (2000 / width)^0.781: ten times the rate of full fine-tuning, by the sweeps of
        "LoRA Without Regret" and the cookbook of Tinker (its exponent of Llamas).

        Args:
            kind: the kind of the base.
            width: the width of its hidden states.

        Example:
            >>> [MethodOptions("lora").rate_on("decoder", width) for width in (576, 4096)]
            [0.0013, 0.00029]
        """
        if kind != "decoder" or self.method != "lora":
            return self.learning_rate
        return float(f"{5e-4 * (2000 / width) ** 0.781:.2g}")

    def build(
        self,
        *,
        head: str | None = None,
        layers: Mapping[str, int] | None = None,
        encode: Callable[[str], Sequence[int]] | None = None,
    ) -> Recipe:
        """Builds the recipe.

        Args:
            head: path of the task's head, which always trains.
            layers: how many layers the model has, for methods that count them, by the pattern of a
                layer, with `{}` for its number: one entry, or one for each stack where they differ.
            encode: gives the tokens of a text, where a tokenizer is there.

        Raises:
            UserError: a flag belongs to another method, a field is out of its range, or the
                recipe file is not valid.
            FileSystemError: the recipe file cannot be read.

        Example:
            >>> MethodOptions("lora", rank=4).build()
            Recipe(
              LoRA(targets=('**/{query,value}',), rank=4),
            )
        """
        fields = given(self)
        fields.pop("method", None)
        if self.recipe is not None:
            return _startable(self._from_file(self.recipe, head))
        preset = PRESETS[self.method or DEFAULT]
        foreign = [flag(name) for name in fields if name not in preset.flags]
        if foreign:
            known = ", ".join(map(flag, preset.flags)) or "none"
            raise UserError(
                f"{', '.join(foreign)}: no field of --method {self.method or DEFAULT}; "
                f"its fields are {known}"
            )
        if "adapter_dropout" in fields:
            fields["dropout"] = fields.pop("adapter_dropout")
        if self.invocation:
            fields["invocation"] = _tokens(self.invocation, encode)
        if self.method not in BY_NUMBER:
            return _startable(preset.make(**fields, head=head))
        made = [
            preset.make(**fields, layer=layer, num_layers=count, head=head)
            for layer, count in (layers or {"**/layer_{}": 0}).items()
        ]
        return _startable(_joined(made))

    def _from_file(self, path: Path, head: str | None) -> Recipe:
        """Reads the recipe of a file, and adds the head, which would stay random untrained."""
        from adapters_jax.presets import head_only
        from adapters_jax.recipe import Recipe

        others = [flag(name) for name in given(self) if name != "recipe"]
        if others:
            raise UserError(
                f"--recipe {path} holds all settings of the method; put {', '.join(others)} into "
                "that file instead"
            )
        try:
            with file_errors(path):
                data = path.read_bytes()
        except FileSystemError as error:
            known = str(path) in PRESETS
            raise FileSystemError(
                f"--recipe {error}; expected a JSON file, as Recipe.to_json writes it"
                + (f"; for the published recipe, write --method {path}" if known else "")
            ) from error
        try:
            recipe = Recipe.from_json(data.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"--recipe {path} is not UTF-8, expected a JSON file") from error
        except UserError as error:
            raise UserError(f"--recipe {path}: {error}") from error
        return recipe + head_only(head=head) if head and not recipe.trains(f"{head}/x") else recipe


def _joined(recipes: Sequence[Recipe]) -> Recipe:
    """One recipe with the targets of several, which differ in these alone."""
    from adapters_jax.recipe import Recipe

    def one(methods: Sequence[Any]) -> Any:
        targets = dict.fromkeys(target for method in methods for target in method.targets)
        return replace(methods[0], targets=tuple(targets))

    return Recipe([one(methods) for methods in zip(*recipes, strict=True)])


def _tokens(
    words: tuple[int | str, ...], encode: Callable[[str], Sequence[int]] | None
) -> tuple[int, ...]:
    """The tokens of an invocation, of ids or of one text."""
    ids = [word for word in words if isinstance(word, int)]
    texts = [word for word in words if isinstance(word, str)]
    if not texts:
        return tuple(ids)
    if encode is None or len(words) > 1:
        raise UserError(
            f"--invocation {shown(words)}: expected the ids of tokens, or, where a decoder is "
            "trained, whose tokenizer reads it, one text in quotation marks"
        )
    return tuple(encode(texts[0]))


def _startable(recipe: Recipe) -> Recipe:
    """The recipe; raises UserError for a start that no command makes, and that would not train."""
    for start in (getattr(method, "a_init", "") for method in recipe.attached):
        if start == "eva" or start.startswith("loftq"):
            raise UserError(
                f"a_init={start!r} needs aj.calibrate, or aj.quantize of an adapted model, which "
                "commands do not call; write gaussian, uniform, gaussian_rank, pissa or olora"
            )
    return recipe
