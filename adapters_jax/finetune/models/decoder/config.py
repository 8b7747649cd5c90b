"""The configuration of a decoder: its sizes, and flags for what tells the architectures apart."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from operator import attrgetter
from typing import Any, ClassVar, Self

from adapters_jax.errors import UserError, check_choice, check_number, check_size, shown
from adapters_jax.finetune.base_files import huggingface
from adapters_jax.finetune.models.decoder import forms, rope, towers
from adapters_jax.finetune.models.decoder.counting import count
from adapters_jax.finetune.models.decoder.delta import DeltaSizes
from adapters_jax.finetune.models.decoder.families import ARCHITECTURES
from adapters_jax.finetune.models.decoder.latent import LatentSizes
from adapters_jax.finetune.models.parts.functions import ACTIVATIONS
from adapters_jax.finetune.models.parts.rotary import RopeScaling

LAYER_TYPES = ("full_attention", "sliding_attention", "linear_attention", "chunked_attention")
# The values of flags, which are ours: a key of this name in a `config.json` means something else.
_FLAGS: Mapping[str, tuple[Any, ...]] = {
    "norm_placement": ("pre", "post", "both", "sum"),
    "norm_type": ("rms", "layer"),
    "qk_norm": (None, "head", "projection", "unit"),
    "router_scores": ("softmax", "sigmoid"),
    "expert_gate": ("apart", "halves", "interleaved"),
    "parallel": (None, "shared", "own"),
}
# The fields that others say in full: `kv_heads`, `head_width`, `layer_kinds`, `layer_forms`.
_DERIVED = {
    *("num_key_value_heads", "head_dim", "sliding_window", "layer_types", "no_rope_layers"),
    *("expert_layers", "attention_chunk_size"),
}
# The settings from which others are computed.
_COUNTS = {
    *("hidden_size", "num_hidden_layers", "max_position_embeddings", "sliding_window"),
    "embedding_size",
    *("original_max_position_embeddings", "sliding_window_pattern", "no_rope_layer_interval"),
    *("moe_intermediate_size", "attention_chunk_size", "interleave_moe_layer_step"),
    "warming_interval",
}
_NUMBERS = {  # whether they may be 0
    **{"query_pre_attn_scalar": False, "max_window_layers": True, "logit_scale": False},
    **{"first_k_dense_replace": True, "n_shared_experts": True},
}
_LISTS = {"layer_types", "no_rope_layers", "expert_layers", "moe_layers"}


@dataclass(frozen=True)
class DecoderConfig(huggingface.CheckpointConfig):
    """The shape of a decoder, under the names that `config.json` uses; LLaMA-7B by default.

    Attributes:
        vocab_size: the number of tokens.
        hidden_size: the width of the hidden states.
        intermediate_size: the width inside the feed-forward.
        num_hidden_layers: the number of layers.
        num_attention_heads: the number of query heads.
        num_key_value_heads: the number of key and value heads; None has one for each query head.
        head_dim: the width of a head; None divides the hidden size by the number of heads.
        hidden_act: the activation of the feed-forward.
        rms_norm_eps: the epsilon of the norms.
        rope_theta: the base of the rotary frequencies.
        initializer_range: the standard deviation of new weights.
        tie_word_embeddings: whether the embedding is the head, too.
        model_type: the architecture, a key of `ARCHITECTURES`.
        max_position_embeddings: the length that the model was made for; see `longest`.
        learned_positions: whether positions have embeddings, which are added to those of tokens,
            instead of rotations.
        position_offset: the number of these embeddings before that of the first token.
        alibi: whether scores fall with the distance of the key, by a slope of the head, instead of
            rotations.
        rope_scaling: how the rotary frequencies are scaled.
        partial_rotary_factor: the part of a head's features that is rotated.
        rotary_interleaved: whether a rotated pair is of neighbouring features, not of two halves.
        rope_local_base_freq: the base of the frequencies, unscaled, in layers with a sliding
            window; None has the others' there.
        no_rope_layers: 1 for layers with rotary positions and 0 for layers without; None has them
            in all.
        sliding_window: the number of tokens that a token sees in sliding attention.
        attention_chunk_size: the number of tokens of a chunk in chunked attention.
        layer_types: `full_attention`, `sliding_attention`, `chunked_attention` or
            `linear_attention` for each layer; None slides in all layers if there is a window.
        head_axis: whether the weights of query, key and value have an axis of heads, as where a
            checkpoint fuses the three head by head.
        latent: the sizes of a latent attention; None has keys and values from projections.
        delta: the sizes of the layers with `linear_attention`, which have the gated delta rule.
        global_head_dim: the width of a head in layers with full attention; None has `head_dim`.
        num_global_key_value_heads: the number of key and value heads there, likewise.
        attention_k_eq_v: whether the key projection computes the values as well there.
        num_kv_shared_layers: the number of last layers that have keys and values of the last layer
            before them with attention of their kind.
        use_double_wide_mlp: whether these layers have feed-forwards twice as wide.
        value_norm: whether values are normalised, without a scale.
        layer_scalar: whether each layer has a factor of its output.
        hidden_size_per_layer_input: the width of the inputs that are made of the tokens for each
            layer separately; 0 has none.
        vocab_size_per_layer_input: the number of tokens with such inputs.
        attention_bias: whether the projections of the attention have biases.
        attention_output_bias: the same of its output projection; None follows `attention_bias`.
        mlp_bias: whether the layers of the feed-forward have biases.
        mlp_gate: whether the feed-forward has a gate.
        parallel: whether the feed-forward reads what the attention reads, not the sum after it:
            through a "shared" norm, or each through its "own".
        attention_gate: whether the query projection also computes gates, for the output of each
            head.
        qk_norm: norms of queries and keys: of each "head", or of the whole "projection", or a
            "unit" norm of each head without a scale, in layers with rotary positions.
        warming_interval: the number of positions after which the factor of queries grows in layers
            without rotary positions; None has no factor.
        warming_scale: by how much; see `rotary.warmed`.
        norm_placement: norms of each sublayer: "pre" of its input, "post" of its output, "both";
            or "sum" of its residual sum, and then no norm follows the last layer.
        norm_type: "rms", or "layer" for layer norms.
        norm_bias: whether layer norms have biases.
        norm_offset: added to the scales of norms; a norm with scale `w` multiplies by `1 + w` if 1.
        embedding_size: the width of the embeddings, if projections to and from the hidden size
            follow them and precede the head; None has the hidden size.
        embedding_norm: whether a norm follows the embeddings.
        embedding_multiplier: the factor of the embeddings.
        attention_multiplier: the factor of the attention scores; None has `head_dim ** -0.5`.
        residual_multiplier: the factor of the output of each sublayer.
        logits_scaling: the divisor of the logits.
        head_bias: whether the head has a bias.
        attn_logit_softcapping: the bound of the attention scores, approached as tanh does.
        final_logit_softcapping: the bound of the logits.
        attention_sinks: whether each head has a score that takes a share of its softmax.
        num_experts: the number of feed-forwards of a layer, each for some of the tokens; 0 has one
            that all take.
        num_experts_per_tok: how many a token takes.
        norm_topk_prob: whether the weights of a token's experts are scaled to sum to 1.
        moe_intermediate_size: the width inside an expert; None has the `intermediate_size`.
        router_bias: whether the router of the experts has a bias.
        router_scores: what makes weights of its logits: "softmax" or "sigmoid".
        router_correction: whether experts are chosen by their scores plus a number for each expert.
        router_groups: the number of groups of experts; a token takes those of some groups alone.
        router_groups_taken: of how many groups.
        router_factor: the factor of the weights.
        router_scale: whether the router reads normalised hidden states, times a factor of each
            feature, and each expert's weight has a factor.
        experts_beside: whether a layer has the experts beside a feed-forward, each with its own
            norms, and their outputs are summed.
        expert_bias: whether the layers of an expert have biases.
        expert_gate: where an expert's gate is: a weight "apart", or beside the other first layer
            in one weight, in the first of "halves" or "interleaved" with it.
        expert_limit: the bound of an expert's gate from above, and of what it is multiplied with,
            plus 1, to both sides.
        shared_expert_intermediate_size: the width inside a further expert, which all tokens take;
            None has no further expert.
        shared_expert_gate: whether its output is multiplied by a gate, one for each token.
        expert_reads_weighted: whether an expert's weight multiplies what it reads, instead of what
            it returns.
        expert_layers: 1 for layers with experts, and 0 for layers with one feed-forward; None has
            experts in all.

    Raises:
        UserError: a setting is of a wrong type, out of range or not supported.

    Example:
        >>> DecoderConfig(num_attention_heads=9, num_key_value_heads=2)
        Traceback (most recent call last):
        adapters_jax.errors.UserError: 9 attention heads do not divide into 2 key and value heads.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    model_type: str = "llama"
    max_position_embeddings: int = 2048
    learned_positions: bool = False
    position_offset: int = 0
    alibi: bool = False
    rope_scaling: RopeScaling | None = None
    partial_rotary_factor: float = 1.0
    rotary_interleaved: bool = False
    rope_local_base_freq: float | None = None
    no_rope_layers: tuple[int, ...] | None = None
    sliding_window: int | None = None
    attention_chunk_size: int | None = None
    layer_types: tuple[str, ...] | None = None
    head_axis: bool = False
    latent: LatentSizes | None = None
    delta: DeltaSizes | None = None
    global_head_dim: int | None = None
    num_global_key_value_heads: int | None = None
    attention_k_eq_v: bool = False
    num_kv_shared_layers: int = 0
    use_double_wide_mlp: bool = False
    value_norm: bool = False
    layer_scalar: bool = False
    hidden_size_per_layer_input: int = 0
    vocab_size_per_layer_input: int = 0
    attention_bias: bool = False
    attention_output_bias: bool | None = None
    mlp_bias: bool = False
    mlp_gate: bool = True
    parallel: str | None = None
    attention_gate: bool = False
    qk_norm: str | None = None
    warming_interval: int | None = None
    warming_scale: float = 0.0
    norm_placement: str = "pre"
    norm_type: str = "rms"
    norm_bias: bool = True
    norm_offset: float = 0.0
    embedding_size: int | None = None
    embedding_norm: bool = False
    embedding_multiplier: float = 1.0
    attention_multiplier: float | None = None
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    head_bias: bool = False
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    num_experts: int = 0
    num_experts_per_tok: int = 0
    norm_topk_prob: bool = False
    moe_intermediate_size: int | None = None
    attention_sinks: bool = False
    router_bias: bool = False
    router_scores: str = "softmax"
    router_correction: bool = False
    router_groups: int = 1
    router_groups_taken: int = 1
    router_factor: float = 1.0
    router_scale: bool = False
    experts_beside: bool = False
    expert_bias: bool = False
    expert_gate: str = "apart"
    expert_limit: float | None = None
    shared_expert_intermediate_size: int | None = None
    shared_expert_gate: bool = False
    expert_reads_weighted: bool = False
    expert_layers: tuple[int, ...] | None = None

    num_parameters = property(count)
    layer_kinds = property(forms.layer_kinds)
    layer_forms = property(forms.layer_forms)
    has_key_bias = property(attrgetter("attention_bias"))
    query_init = 1.0  # a factor of the new weights of the query projection
    mlp_first = "up"  # the name of the feed-forward's first layer, if there is no gate

    supported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "hidden_act": tuple(ACTIVATIONS),
        "attention_dropout": (0.0,),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        # The architectures are read now, since another package may have added one.
        self._check(vars(self), {"model_type": tuple(ARCHITECTURES), **_FLAGS})
        for name in ("num_hidden_layers", "kv_heads", "head_width"):
            check_size("DecoderConfig", name, getattr(self, name))
        _check_given(vars(self))
        self._check_heads()
        self._check_layers()
        self._check_together()
        if self.num_experts:
            self._check_experts()

    def _check_heads(self) -> None:
        check_number("DecoderConfig", "partial_rotary_factor", self.partial_rotary_factor, high=2.0)
        if self.num_attention_heads % self.kv_heads:
            raise UserError(
                f"{self.num_attention_heads} attention heads do not divide into {self.kv_heads} "
                "key and value heads."
            )
        if not self.rotates:
            return
        for name in ("rope_theta", "rope_local_base_freq"):
            if getattr(self, name) is not None:
                check_number("DecoderConfig", name, getattr(self, name), low=1.0, closed=True)
        if self.rotated % 2 or not 0 < self.rotated <= self.head_width:
            raise UserError(
                f"{self.rotated} of {self.head_width} features of a head are rotated, expected an "
                "even number; change head_dim or partial_rotary_factor."
            )

    def _check_layers(self) -> None:
        for name in ("layer_types", "no_rope_layers", "expert_layers"):
            each = getattr(self, name)
            if each is not None and len(each) != self.num_hidden_layers:
                raise UserError(
                    f"{name} has {len(each)} layers, expected {self.num_hidden_layers}, the "
                    "num_hidden_layers."
                )
        for kind in self.layer_types or ():
            check_choice("DecoderConfig", "layer_types", kind, LAYER_TYPES)
        if "sliding_attention" in (self.layer_types or ()) and not self.sliding_window:
            raise UserError("layer_types has sliding_attention, which needs a sliding_window >= 1.")
        if "chunked_attention" in (self.layer_types or ()) and not self.attention_chunk_size:
            raise UserError(
                "layer_types has chunked_attention, which needs an attention_chunk_size >= 1."
            )
        if "linear_attention" in (self.layer_types or ()) and self.delta is None:
            raise UserError(
                "layer_types has linear_attention, which needs the sizes of the gated delta rule "
                f"(model_type={self.model_type!r} has none)."
            )
        own = self.num_hidden_layers - self.num_kv_shared_layers
        types = self.layer_types or ()
        if self.num_kv_shared_layers and (own < 1 or {*types[own:]} - {*types[:own]}):
            raise UserError(
                f"num_kv_shared_layers={self.num_kv_shared_layers} of {self.num_hidden_layers} "
                "layers, expected an earlier layer of each of their layer_types."
            )
        if self.hidden_size_per_layer_input and self.vocab_size_per_layer_input < self.vocab_size:
            raise UserError(
                f"vocab_size_per_layer_input={self.vocab_size_per_layer_input}, expected at least "
                f"the vocab_size={self.vocab_size}: each token needs an input."
            )

    def _check_experts(self) -> None:
        taken, experts = self.num_experts_per_tok, self.num_experts
        if not 0 < taken <= experts:
            raise UserError(
                f"num_experts_per_tok={taken}, expected a whole number >= 1 and at most "
                f"num_experts={experts}."
            )
        groups, chosen = self.router_groups, self.router_groups_taken
        if not 0 < chosen <= groups or experts % groups or (groups > 1 and experts < 2 * groups):
            raise UserError(
                f"{chosen} of {groups} groups of {experts} experts, expected groups of one size, "
                "at least 2, and at most all of them."
            )
        if taken > chosen * (experts // groups):
            raise UserError(
                f"num_experts_per_tok={taken}, expected at most the {chosen * (experts // groups)} "
                f"experts of {chosen} groups."
            )

    def _check_together(self) -> None:
        """Refuses flags that contradict each other."""
        if self.parallel and self.norm_placement != "pre":
            raise UserError(
                f"parallel={self.parallel!r} with norm_placement={self.norm_placement!r}, expected "
                "'pre': both sublayers read norms of the layer's input."
            )
        if self.head_axis and self.qk_norm == "projection":
            raise UserError("head_axis=True with qk_norm='projection', expected None or 'head'.")
        if self.head_axis and self.attention_gate:
            raise UserError("head_axis=True with attention_gate=True, expected one of them.")
        if self.alibi and self.learned_positions:
            raise UserError("alibi=True with learned_positions=True, expected one of them.")
        if self.embedding_size and self.embedding_norm:
            raise UserError(
                f"embedding_size={self.embedding_size} with embedding_norm=True, expected one."
            )
        if self.head_bias and self.tie_word_embeddings:
            raise UserError("head_bias=True, expected False: the tied embedding has no bias.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Takes the fields from a parsed `config.json`.

        Raises:
            UserError: a setting is not supported; the message names it.
        """
        values = rope.flat({"model_type": "llama", **towers.text_of(values)})
        cls._check(values, {"model_type": tuple(ARCHITECTURES)})
        architecture = ARCHITECTURES[values["model_type"]]
        cls._check(values, {**cls.supported, **architecture.supported})
        values = architecture.named(values)
        _check_given(values)
        found = architecture.fields(values)
        longest = found.get("max_position_embeddings", cls.max_position_embeddings)
        return cls(**found, rope_scaling=rope.read_scaling(values, longest))

    def to_dict(self) -> dict[str, Any]:
        """The values of a `config.json` that transformers reads as the same model.

        Raises:
            UserError: a field is another than the architecture implies, so no file could hold it.

        Example:
            >>> DecoderConfig(hidden_size=512).to_dict()["head_dim"]
            16
            >>> DecoderConfig(qk_norm="head").to_dict()
            Traceback (most recent call last):
            adapters_jax.errors.UserError: model_type='llama' cannot have qk_norm='head' (it has \
None); choose another model_type.
        """
        values = ARCHITECTURES[self.model_type].values(self)
        again = self.from_dict(values)
        names = [each.name for each in fields(self) if each.name not in _DERIVED]
        lost = [
            f"{name}={own!r} (it has {theirs!r})"
            for name in (*names, "kv_heads", "head_width", "layer_kinds", "layer_forms")
            for own, theirs in [(getattr(self, name), getattr(again, name))]
            if own != theirs and not _alike(own, theirs)
        ]
        if lost:
            raise UserError(
                f"model_type={self.model_type!r} cannot have {', '.join(lost)}; choose another "
                "model_type."
            )
        return values

    def identity(self) -> dict[str, Any]:
        """The fields that tell one base from another, without flags that are not set."""
        every = fields(self)
        first = [each.name for each in every].index("model_type")
        unset = {each.name for each in every[first:] if getattr(self, each.name) == each.default}
        unset.add("max_position_embeddings")
        return {name: x for name, x in asdict(self).items() if name not in unset}

    def deviation(self, inputs: int) -> float:
        """The standard deviation of new weights of a layer with that number of inputs."""
        return self.initializer_range

    @property
    def kv_heads(self) -> int:
        """The number of key and value heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_width(self) -> int:
        """The width of one head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def has_output_bias(self) -> bool:
        """Whether the output projection of the attention has a bias."""
        own = self.attention_output_bias
        return self.attention_bias if own is None else own

    @property
    def longest(self) -> int:
        """The largest number of tokens of a text, with those that scaled rotary positions add.

        llama3 and longrope count theirs in `max_position_embeddings` already.
        """
        most, scaling = self.max_position_embeddings, self.rope_scaling
        if scaling is None or scaling.rope_type in ("llama3", "longrope"):
            return most
        original = scaling.original_max_position_embeddings or most
        return max(most, int(original * scaling.factor))

    @property
    def rotates(self) -> bool:
        """Whether positions are rotations, at least in some layers."""
        return not (self.learned_positions or self.alibi)

    @property
    def rotated(self) -> int:
        """The number of a head's features that are rotated."""
        return int(self.head_width * self.partial_rotary_factor)

    def with_layers(self, number: int) -> Self:
        """The configuration of a model of the first layers alone."""
        shared = max(0, number - (self.num_hidden_layers - self.num_kv_shared_layers))
        one = replace(self, num_kv_shared_layers=0)
        return replace(super(DecoderConfig, one).with_layers(number), num_kv_shared_layers=shared)


def _alike(one: Any, other: Any) -> bool:
    """Whether two numbers differ by rounding alone."""
    numbers = isinstance(one, float) and isinstance(other, float)
    return numbers and math.isclose(one, other, rel_tol=1e-9)


def _check_given(values: Mapping[str, Any]) -> None:
    """Checks the settings from which others are computed, before they are."""
    given = {name: value for name, value in values.items() if value is not None}
    for name in _COUNTS & given.keys():
        check_size("DecoderConfig", name, given[name])
    for name in _NUMBERS.keys() & given.keys():
        check_number("DecoderConfig", name, given[name], closed=_NUMBERS[name])
    for name in _LISTS & given.keys():
        if not isinstance(given[name], list | tuple):
            raise UserError(f"DecoderConfig: {name}={shown(given[name])}, expected a list")
    huggingface.check_layers("DecoderConfig", given.get("num_hidden_layers", 1))
