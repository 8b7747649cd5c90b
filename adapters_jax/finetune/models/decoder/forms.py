"""What tells the layers of a decoder apart: the modules that they have, and how they attend."""

from typing import Any, NamedTuple

from adapters_jax.finetune.models.parts.rotary import LayerKind


class LayerForm(NamedTuple):
    """What tells the modules of a layer from those of others; layers of one form can be scanned.

    Attributes:
        delta: whether it has the gated delta rule instead of a softmax attention.
        dense: whether it has one feed-forward where others have experts.
        bare: whether its queries and keys are not normalised, as those with positions are.
        head_width: the width of a head; None has the configuration's.
        kv_heads: the number of key and value heads, likewise.
        key_is_value: whether the key projection computes the values as well.
        pool: the kind of attention among whose layers its keys and values are shared; None shares
            none.
        borrows: whether they are those of an earlier layer.
        wide: whether the feed-forward is twice as wide.
    """

    delta: bool = False
    dense: bool = False
    bare: bool = False
    head_width: int | None = None
    kv_heads: int | None = None
    key_is_value: bool = False
    pool: str | None = None
    borrows: bool = False
    wide: bool = False


def layer_forms(config: Any) -> tuple[LayerForm, ...]:
    """The form of each layer of a `DecoderConfig`."""
    types = config.layer_types or ("",) * config.num_hidden_layers
    experts = config.expert_layers or (1,) * config.num_hidden_layers
    ropes = config.no_rope_layers or (1,) * config.num_hidden_layers
    tells = config.qk_norm == "unit" or config.warming_interval is not None
    own = config.num_hidden_layers - config.num_kv_shared_layers
    lenders = {each: at for at, each in enumerate(types[:own]) if config.num_kv_shared_layers}

    def of(at: int, each: str) -> LayerForm:
        whole, borrows = each == "full_attention", at >= own
        return LayerForm(
            delta=each == "linear_attention",
            dense=not experts[at],
            bare=tells and not ropes[at],
            head_width=config.global_head_dim if whole else None,
            kv_heads=config.num_global_key_value_heads if whole else None,
            key_is_value=config.attention_k_eq_v and whole,
            pool=each if borrows or lenders.get(each) == at else None,
            borrows=borrows,
            wide=borrows and config.use_double_wide_mlp,
        )

    return tuple(of(at, each) for at, each in enumerate(types))


def layer_kinds(config: Any) -> tuple[LayerKind, ...]:
    """The kind of attention of each layer."""
    every = "sliding_attention" if config.sliding_window else "full_attention"
    types = config.layer_types or (every,) * config.num_hidden_layers
    ropes = config.no_rope_layers or (1,) * config.num_hidden_layers
    return tuple(
        LayerKind(linear=True) if each == "linear_attention" else _kind(config, each, bool(rope))
        for each, rope in zip(types, ropes, strict=True)
    )


def _kind(config: Any, layer_type: str, rotates: bool) -> LayerKind:
    slides = layer_type == "sliding_attention"
    window = config.sliding_window if slides else None
    chunk = config.attention_chunk_size if layer_type == "chunked_attention" else None
    if not rotates or not config.rotates:
        every = config.warming_interval
        warming = (every, config.warming_scale) if every and not rotates else None
        return LayerKind(window, chunk=chunk, warming=warming)
    if slides and config.rope_local_base_freq is not None:
        return LayerKind(window, config.rope_local_base_freq)
    rotated = config.global_head_dim if config.global_head_dim and not slides else None
    return LayerKind(window, config.rope_theta, config.rope_scaling, chunk=chunk, rotated=rotated)
