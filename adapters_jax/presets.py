"""Recipes of published methods, and of the baselines that papers compare with."""

from collections.abc import Iterable
from typing import Any, Literal

from adapters_jax.errors import UserError, check_choice, check_size, shown
from adapters_jax.methods import (
    IA3,
    OFT,
    ActivatedLoRA,
    AdaLoRA,
    Bottleneck,
    Compacter,
    DoRA,
    LlamaAdapter,
    LoHa,
    LoKr,
    LoRA,
    LoReFT,
    Method,
    PrefixTuning,
    PromptTuning,
    Unfreeze,
    VeRA,
)
from adapters_jax.recipe import Recipe
from adapters_jax.targets import as_patterns, either

# As the models of this library name them; other models are adapted by `targets`.
OUTPUTS = ("**/attention/output", "**/mlp/output")
LAYER = "**/{layer_{}|layers/{}}"  # one layer of an encoder or a decoder
# `attention_norm`, flax's `LayerNorm_0`, GPT-2's `ln_1`. One of the parts is enough, hence the
# bars: RMSNorm has no bias.
LAYER_NORMS = "**/*{norm|Norm|ln}*/{scale|bias}"


def _recipe(*parts: Method | None, head: str | None) -> Recipe:
    """A recipe of the methods that are not None, with the head unfrozen where one is named."""
    if not (head is None or isinstance(head, str)):
        raise UserError(
            f"head={shown(head)}, expected the path of one module, as in head='head'; for several "
            "add aj.Unfreeze(('NAME/**', 'OTHER/**')) to the recipe"
        )
    ends = Unfreeze(f"{head}/**") if head else None
    return Recipe(*[part for part in (*parts, ends) if part is not None])


def _bottleneck(targets: Any, m: int | None, reduction_factor: float | None, **fields: Any):
    """A Bottleneck, of width 64 unless one of the two width fields is given."""
    m = 64 if m is None and reduction_factor is None else m
    return Bottleneck(targets, m, reduction_factor, **fields)


def houlsby(
    bottleneck_dim: int | None = None,
    reduction_factor: float | None = None,
    *,
    targets: str | tuple[str, ...] = OUTPUTS,
    layer_norms: str | None = LAYER_NORMS,
    head: str | None = None,
    **fields: Any,
) -> Recipe:
    """Houlsby et al. 2019, arXiv:1902.00751: two adapters a block, layer norms and head.

    Args:
        bottleneck_dim: m; 64 where neither width field is given.
        reduction_factor: as in `Bottleneck`.
        targets: patterns of the output projections of attention and of the feed-forward layer.
        layer_norms: pattern of the layer norms' parameters; None leaves them frozen.
        head: path of the task's head, which trains whole.
        **fields: further fields of `Bottleneck`.

    Raises:
        UserError: a field of `Bottleneck` is out of its range, or `head` is not a text.

    Example:
        >>> houlsby(32, head="head")
        Recipe(
          Bottleneck(targets=('**/attention/output', '**/mlp/output'), bottleneck_dim=32),
          Unfreeze(targets=('**/*{norm|Norm|ln}*/{scale|bias}',)),
          Unfreeze(targets=('head/**',)),
        )
    """
    norms = Unfreeze(layer_norms) if layer_norms else None
    return _recipe(
        _bottleneck(targets, bottleneck_dim, reduction_factor, **fields), norms, head=head
    )


def pfeiffer(
    bottleneck_dim: int | None = None,
    reduction_factor: float | None = None,
    *,
    targets: str | tuple[str, ...] = "**/mlp/output",
    head: str | None = None,
    **fields: Any,
) -> Recipe:
    """Pfeiffer et al. 2021, arXiv:2005.00247: one adapter a block, after the feed-forward layer.

    In post-norm models, the paper found `targets="**/mlp_norm", placement="norm"` best, which
    AdapterHub calls seq_bn: the adapter reads the norm's output and adds to the norm's input.

    Args:
        bottleneck_dim, reduction_factor, head, **fields: as in `houlsby`.
        targets: patterns of the output projections of the feed-forward layers.

    Raises:
        UserError: as in `houlsby`.

    Example:
        >>> pfeiffer(reduction_factor=16)
        Recipe(
          Bottleneck(targets=('**/mlp/output',), reduction_factor=16),
        )
    """
    return _recipe(_bottleneck(targets, bottleneck_dim, reduction_factor, **fields), head=head)


def parallel(
    bottleneck_dim: int | None = None,
    reduction_factor: float | None = None,
    *,
    targets: str | tuple[str, ...] = "**/mlp",
    scale: float = 4.0,
    head: str | None = None,
    **fields: Any,
) -> Recipe:
    """He et al. 2022, arXiv:2110.04366: an adapter beside the feed-forward layer, scaled by 4.

    Args:
        bottleneck_dim, reduction_factor, head, **fields: as in `houlsby`.
        targets: patterns of whole feed-forward layers, whose input the adapter reads.
        scale: factor on the adapter's output.

    Raises:
        UserError: as in `houlsby`.

    Example:
        >>> parallel(32)
        Recipe(
          Bottleneck(targets=('**/mlp',), bottleneck_dim=32, placement='parallel', scale=4.0),
        )
    """
    adapter = _bottleneck(
        targets, bottleneck_dim, reduction_factor, placement="parallel", scale=scale, **fields
    )
    return _recipe(adapter, head=head)


def compacter(
    bottleneck_dim: int | None = None,
    reduction_factor: float | None = None,
    *,
    targets: str | tuple[str, ...] = OUTPUTS,
    head: str | None = None,
    **fields: Any,
) -> Recipe:
    """Mahabadi et al. 2021, arXiv:2106.04647: two adapters a block, of Kronecker products.

    With `targets="**/mlp/output"` it is their Compacter++, one adapter a block.

    Args:
        bottleneck_dim: m; d / 32 where neither width field is given, as in AdapterHub.
        reduction_factor, targets, head: as in `houlsby`.
        **fields: further fields of `Compacter`.

    Raises:
        UserError: as in `houlsby`.

    Example:
        >>> compacter()
        Recipe(
          Compacter(targets=('**/attention/output', '**/mlp/output'), reduction_factor=32),
        )
    """
    if bottleneck_dim is None and reduction_factor is None:
        reduction_factor = 32
    return _recipe(Compacter(targets, bottleneck_dim, reduction_factor, **fields), head=head)


def lora(
    rank: int = 8,
    alpha: float | None = None,
    *,
    targets: str | tuple[str, ...] = "**/{query,value}",
    bias: Literal["none", "all", "lora_only"] = "none",
    dora: bool = False,
    invocation: tuple[int, ...] = (),
    head: str | None = None,
    **fields: Any,
) -> Recipe:
    """Hu et al. 2021, arXiv:2106.09685: low-rank factors on the query and value projections.

    Args:
        rank: r.
        alpha: the scale is alpha / r; None means alpha = r.
        targets: patterns of linear layers.
        bias: which biases train as well: none, all of the model, or those that the targets have.
        dora: use `DoRA` instead of `LoRA`.
        invocation: tokens from whose last occurrence on it acts: use `ActivatedLoRA`.
        head: path of the task's head, which trains whole.
        **fields: further fields of `LoRA`.

    Raises:
        UserError: `bias` has another value, a field of `LoRA` is out of its range, or `head` is
            not a text; or `dora` and `invocation` are both given.

    Example:
        >>> lora(4, bias="lora_only")
        Recipe(
          LoRA(targets=('**/{query,value}',), rank=4),
          Unfreeze(targets=('**/{query|value}/bias',)),
        )
    """
    check_choice("lora", "bias", bias, ("none", "all", "lora_only"))
    if dora and invocation:
        raise UserError(f"lora: dora=True and invocation={shown(invocation)}, expected one of them")
    kind = DoRA if dora else LoRA
    if invocation:
        kind, fields = ActivatedLoRA, {**fields, "invocation": invocation}
    factors = kind(targets, rank, alpha, **fields)
    # A projection of the targets may have no bias, which is no mistake here.
    own = tuple(f"{either(target)}/bias" for target in factors.targets)
    biases = {"none": None, "all": Unfreeze("**/bias"), "lora_only": Unfreeze(own)}
    return _recipe(factors, biases[bias], head=head)


def loha(
    rank: int = 8,
    alpha: float | None = None,
    *,
    targets: str | tuple[str, ...] = "**/{query,value}",
    head: str | None = None,
    **fields: Any,
) -> Recipe:
    """Hyeon-Woo et al. 2022, arXiv:2108.06098: a product of two low-rank products, entry by entry.

    Args:
        rank, alpha, **fields: fields of `LoHa`.
        targets, head: as in `lora`.

    Raises:
        UserError: as in `lora`.

    Example:
        >>> loha(4)
        Recipe(
          LoHa(targets=('**/{query,value}',), rank=4),
        )
    """
    return _recipe(LoHa(targets, rank, alpha, **fields), head=head)


def lokr(
    rank: int = 8,
    alpha: float | None = None,
    *,
    targets: str | tuple[str, ...] = "**/{query,value}",
    head: str | None = None,
    **fields: Any,
) -> Recipe:
    """Edalati et al. 2022, arXiv:2212.10650: a Kronecker product, with a low-rank right factor.

    Args:
        rank, alpha, **fields: fields of `LoKr`; the paper's own form has `full=True`.
        targets, head: as in `lora`.

    Raises:
        UserError: as in `lora`.

    Example:
        >>> lokr(4, factor=16)
        Recipe(
          LoKr(targets=('**/{query,value}',), rank=4, factor=16),
        )
    """
    return _recipe(LoKr(targets, rank, alpha, **fields), head=head)


def oft(
    block: int = 32,
    *,
    targets: str | tuple[str, ...] = "**/{query,value}",
    head: str | None = None,
    **fields: Any,
) -> Recipe:
    """Qiu et al. 2023, arXiv:2306.07280: rotations of a layer's inputs.

    Args:
        block: inputs that one rotation mixes; it has to divide the inputs of all targets.
        targets, head: as in `lora`.
        **fields: further fields of `OFT`.

    Raises:
        UserError: as in `lora`.

    Example:
        >>> oft(16, terms=5)
        Recipe(
          OFT(targets=('**/{query,value}',), block=16, terms=5),
        )
    """
    return _recipe(OFT(targets, block, **fields), head=head)


def vera(
    rank: int = 256,
    *,
    targets: str | tuple[str, ...] = "**/{query,value}",
    head: str | None = None,
    **fields: Any,
) -> Recipe:
    """Kopiczko et al. 2024, arXiv:2310.11454: scales of random factors that all layers share.

    Args:
        rank, **fields: fields of `VeRA`.
        targets, head: as in `lora`.

    Raises:
        UserError: as in `lora`.

    Example:
        >>> vera(64)
        Recipe(
          VeRA(targets=('**/{query,value}',), rank=64),
        )
    """
    return _recipe(VeRA(targets, rank, **fields), head=head)


def adalora(
    rank: int = 12,
    alpha: float | None = None,
    *,
    targets: str | tuple[str, ...] = "**/{query,value}",
    head: str | None = None,
    **fields: Any,
) -> Recipe:
    """Zhang et al. 2023, arXiv:2303.10512: LoRA whose ranks `adalora_budget` divides.

    Args:
        rank: r at the start; the paper starts at 1.5 times the rank that it ends with.
        targets: patterns of linear layers; the paper adapts all of a block.
        alpha, head: as in `lora`.
        **fields: further fields of `AdaLoRA`.

    Raises:
        UserError: as in `lora`.

    Example:
        >>> adalora(6)
        Recipe(
          AdaLoRA(targets=('**/{query,value}',), rank=6),
        )
    """
    return _recipe(AdaLoRA(targets, rank, alpha, **fields), head=head)


def ia3(
    *,
    targets: str | tuple[str, ...] = "**/{key,value}",
    feed_forward: str | tuple[str, ...] = "**/mlp/{output/dense|output}",
    head: str | None = None,
) -> Recipe:
    """Liu et al. 2022, arXiv:2205.05638: scales of keys, values and inner feed-forward activations.

    Args:
        targets: patterns of linear layers whose outputs are scaled.
        feed_forward: patterns of the feed-forward's last projections, whose inputs are scaled.
        head: as in `lora`.

    Raises:
        UserError: as in `lora`.
        TargetError: `targets` or `feed_forward` are no patterns.

    Example:
        >>> ia3(feed_forward="**/mlp/output")
        Recipe(
          IA3(targets=('**/{key,value}', '**/mlp/output'), feed_forward=('**/mlp/output',)),
        )
    """
    inner = as_patterns(feed_forward, "ia3 feed_forward")
    return _recipe(IA3((*as_patterns(targets, "ia3"), *inner), inner), head=head)


def loreft(
    rank: int = 4,
    *,
    last: int | None = None,
    num_layers: int | None = None,
    layers: Iterable[int] | None = None,
    targets: str = LAYER,
    head: str | None = None,
    **fields: Any,
) -> Recipe:
    """Wu et al. 2024, arXiv:2404.03592: edits of what layers return, at the first tokens.

    Args:
        rank: r.
        last, num_layers, layers, head: as in `llama_adapter`; of `num_layers` alone all are taken.
        targets: pattern of one layer with `{}` for its number, or of all: "layers" where they are
            scanned.
        **fields: further fields of `LoReFT`, such as `suffix_positions=3`.

    Raises:
        UserError: as in `llama_adapter`, or `targets` has `{}` and no numbers are given.

    Example:
        >>> loreft(num_layers=2, targets="layers/{}", suffix_positions=3)
        Recipe(
          LoReFT(targets=('layers/0', 'layers/1'), rank=4, suffix_positions=3),
        )
    """
    if last is None and layers is None:
        if "{}" in targets and num_layers is None:
            raise UserError(
                f"loreft: targets={targets!r} with the numbers of no layers; give num_layers, or "
                "layers, or a pattern of whole layers, such as targets='layers' of scanned ones"
            )
        if num_layers is not None:
            check_size("loreft", "num_layers", num_layers)
            layers = range(num_layers)
    chosen = _chosen("loreft", targets, last, num_layers, layers)
    return _recipe(LoReFT(chosen, rank, **fields), head=head)


def llama_adapter(
    prompt_length: int = 10,
    *,
    last: int | None = None,
    num_layers: int | None = None,
    layers: Iterable[int] | None = None,
    targets: str = "layers/{}/attention",
    head: str | None = None,
    **fields: Any,
) -> Recipe:
    """Zhang et al. 2023, arXiv:2303.16199: gated prompts; the top 30 of LLaMA-7B's 32 layers there.

    Args:
        prompt_length: K, tokens of each layer's prompt.
        last: how many layers get a prompt, counted from the top; needs `num_layers`.
        num_layers: how many layers the model has.
        layers: instead of `last`: the layers' numbers, such as `range(2, 32)`; all by default.
        targets: pattern of one layer's attention, with `{}` for the layer's number.
        head: path of the task's head, which trains whole.
        **fields: further fields of `LlamaAdapter`.

    Raises:
        UserError: `last` is not between 1 and `num_layers`, `last` comes with `layers` or without
            `num_layers`, or layers are chosen and `targets` has no `{}`; or a field of
            `LlamaAdapter` is out of its range, or `head` is not a text.

    Example:
        >>> llama_adapter(last=2, num_layers=32)
        Recipe(
          LlamaAdapter(targets=('layers/30/attention', 'layers/31/attention')),
        )
    """
    chosen = _chosen("llama_adapter", targets, last, num_layers, layers)
    return _recipe(LlamaAdapter(chosen, prompt_length, **fields), head=head)


def prefix_tuning(
    length: int = 20,
    *,
    last: int | None = None,
    num_layers: int | None = None,
    layers: Iterable[int] | None = None,
    targets: str = "layers/{}/attention",
    head: str | None = None,
    **fields: Any,
) -> Recipe:
    """Li and Liang 2021, arXiv:2101.00190: trained keys and values in every layer.

    Args:
        length: K, tokens of each layer's prefix.
        last, num_layers, layers, targets, head: as in `llama_adapter`.
        **fields: further fields of `PrefixTuning`.

    Raises:
        UserError: as in `llama_adapter`.

    Example:
        >>> prefix_tuning(10, layers=[0, 1])
        Recipe(
          PrefixTuning(targets=('layers/0/attention', 'layers/1/attention'), length=10),
        )
    """
    chosen = _chosen("prefix_tuning", targets, last, num_layers, layers)
    return _recipe(PrefixTuning(chosen, length, **fields), head=head)


def prompt_tuning(
    length: int = 20,
    *,
    targets: str = "{embeddings|**/embeddings/word}",
    head: str | None = None,
    **fields: Any,
) -> Recipe:
    """Lester et al. 2021, arXiv:2104.08691: trained embeddings before those of the input.

    Args:
        length: K, tokens of the prompt, whose placeholders `aj.with_prompt` adds to ids.
        targets: the pattern of the embedding of tokens.
        head: as in `lora`.
        **fields: further fields of `PromptTuning`.

    Raises:
        UserError: as in `lora`.

    Example:
        >>> prompt_tuning(8)
        Recipe(
          PromptTuning(targets=('{embeddings|**/embeddings/word}',), length=8),
        )
    """
    return _recipe(PromptTuning(targets, length, **fields), head=head)


def _chosen(
    owner: str, targets: str, last: int | None, num_layers: int | None, layers: Iterable[int] | None
) -> tuple[str, ...]:
    """The patterns of the chosen layers; of all, where neither `last` nor `layers` is given."""
    if last is not None:
        if layers is not None or num_layers is None:
            raise UserError(f"{owner}: give last together with num_layers, or layers alone")
        layers = _top(owner, "last", last, num_layers)
    if layers is None:
        # Scanned layers are one module, whose path has no number.
        return (targets.replace("/{}/", "/**/").replace("{}", "*"),)
    return _numbered(owner, "targets", targets, layers)


def _top(owner: str, name: str, count: int, num_layers: int) -> range:
    """The numbers of the top layers."""
    if not 1 <= count <= num_layers:
        raise UserError(f"{owner}: {name}={count}, expected 1 to num_layers={num_layers}")
    return range(num_layers - count, num_layers)


def _numbered(owner: str, name: str, pattern: str, layers: Iterable[int]) -> tuple[str, ...]:
    """One pattern for each layer, so that a layer that does not exist raises an error."""
    if "{}" not in pattern:
        raise UserError(f"{owner}: {name}={pattern!r}, expected {{}} where the layer's number is")
    return tuple(pattern.replace("{}", str(number)) for number in layers)


def bitfit(*, head: str | None = None) -> Recipe:
    """Ben Zaken et al. 2022, arXiv:2106.10199: the biases, and the task's head.

    Args:
        head: path of the task's head, which trains whole.

    Raises:
        UserError: `head` is not a text.

    Example:
        >>> bitfit(head="head")
        Recipe(
          Unfreeze(targets=('**/bias',)),
          Unfreeze(targets=('head/**',)),
        )
    """
    return _recipe(Unfreeze("**/bias"), head=head)


def layer_norms(*, targets: str = LAYER_NORMS, head: str | None = None) -> Recipe:
    """The layer norms alone: the smallest baseline of Houlsby et al. 2019, arXiv:1902.00751.

    Args:
        targets: pattern of the layer norms' parameters.
        head: path of the task's head, which trains whole.

    Raises:
        TargetError: `targets` is not a pattern.
        UserError: `head` is not a text.

    Example:
        >>> layer_norms()
        Recipe(
          Unfreeze(targets=('**/*{norm|Norm|ln}*/{scale|bias}',)),
        )
    """
    return _recipe(Unfreeze(targets), head=head)


def last_layers(
    k: int, num_layers: int, *, layer: str = "**/layer_{}", head: str | None = None
) -> Recipe:
    """All parameters of the top layers: the baseline of Houlsby et al. 2019, arXiv:1902.00751.

    Args:
        k: how many layers train, counted from the top.
        num_layers: how many layers the model has.
        layer: pattern of one layer, with `{}` for its number.
        head: path of the task's head, which trains whole.

    Raises:
        UserError: k is not between 1 and `num_layers`, `layer` has no `{}`, or `head` is not a
            text.

    Example:
        >>> last_layers(2, 12)
        Recipe(
          Unfreeze(targets=('**/layer_10/**', '**/layer_11/**')),
        )
    """
    names = _numbered("last_layers", "layer", layer, _top("last_layers", "k", k, num_layers))
    return _recipe(Unfreeze(tuple(f"{name}/**" for name in names)), head=head)


def full() -> Recipe:
    """Full fine-tuning: every parameter trains.

    Example:
        >>> full()
        Recipe(
          Unfreeze(targets=('**',)),
        )
    """
    return Recipe(Unfreeze("**"))


HEAD = "head"  # path of the task's head in this library's classifiers


def head_only(*, head: str | None = None) -> Recipe:
    """The frozen base with a trained head: the baseline of every adapter."""
    return Recipe(Unfreeze(f"{head or HEAD}/**"))
