"""Converts AdapterHub's heads to our leaves, and back.

AdapterHub's heads read the pooler, the first token or, for tags and answers, the state of each
token. A head of two layers corresponds to ours of
one layer on a pooler that trains with it, since a pooler computes `tanh(dense(first token))`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from adapters_jax.files.adapterhub.blocks import Blocks
from adapters_jax.files.adapterhub.config import Config
from adapters_jax.files.layouts import Array, ModuleReference
from adapters_jax.files.module_map import Leaves, ModuleMap, as_in_base, our_leaves, their_leaves
from adapters_jax.files.settings import anything, field_problems, one_of

HEAD, POOLER = "classifier", "pooler.dense"  # BERT's names
_OURS = {HEAD: "head", POOLER: "pooler/dense"}
POOLINGS = ("pooler", "cls", "tokens")
OF_TOKENS = ("tagging", "question_answering")
IMAGES = "image_classification"
KINDS = ("classification", "multilabel_classification", "multiple_choice", IMAGES, *OF_TOKENS)
# The names of other architectures' own classifiers.
_STATIC = {"classifier.dense": POOLER, "classifier.out_proj": HEAD, "pre_classifier": POOLER}
_ADVICE = "load_adapterhub(..., with_head=False) omits the head"
_WORDS_DIFFER = (
    "lm_head.weight differs from the base's, which is tied to the word embeddings, and adapters do "
    "not change those"
)


def read(
    whole: Config, tensors: Mapping[str, Array], blocks: Blocks, pooling: str | None
) -> tuple[Leaves, list[str]]:
    """Returns the trained leaves of a head by path, and a sentence for each problem."""
    module_map, config = blocks.module_map, whole.get("config")
    problems: list[str] = []
    if config is None:
        by_module, needed = _static(tensors, module_map, problems)
    else:
        activation = blocks.architecture.pooler
        by_module, needed = _flexible(whole, config, tensors, activation, problems)
    leaves: Leaves = {}
    for (module, kind), tensor in {} if problems else by_module.items():
        there = _at(module_map, module)[:1]
        if not there:
            problems.append(f"names has no path for {module} of the head; {_ADVICE}")
        wrong: list[str] = []
        leaves |= our_leaves(f"the head's {module}.{kind}", kind, tensor, there, False, wrong)
        problems += [f"{problem}; {_ADVICE}" for problem in wrong]
    leaves = {path: x.astype(module_map.base[path].dtype) for path, x in leaves.items()}
    known = pooling or ("pooler" if _at(module_map, POOLER) else None)
    if needed and leaves and known != needed:
        problems.append(
            f"its head reads {needed!r}: give pooling={needed!r}, and as base the parameters of "
            f"a classifier with pooling={needed!r}"
        )
    if not needed and as_in_base(leaves, module_map):
        return {}, problems  # an output layer that the file only repeats
    return leaves, problems


def _at(module_map: ModuleMap, name: str) -> tuple[ModuleReference, ...]:
    """The head or the pooler, by BERT's name or, in tables with another, by our path."""
    end = _OURS.get(name)
    return module_map.at(name) or tuple(
        reference
        for (reference, *rest) in module_map.modules.values()
        if end and not rest and f"/{reference.path}".endswith(f"/{end}")
    )


def _static(
    tensors: Mapping[str, Array], module_map: ModuleMap, problems: list[str]
) -> tuple[dict[tuple[str, str], Array], str | None]:
    """The tensors of a model class's own head by module and kind, and the pooling it reads."""
    by_module = {}
    for key, tensor in tensors.items():
        module, _, kind = key.rpartition(".")
        if module == "lm_head" and module_map.tied:
            tied = module_map.at(module_map.tied[1])
            words = (f"{each.path}/{each.weight}" for each in tied)
            if not any(as_in_base({path: tensor}, module_map) for path in words):
                problems.append(f"{_WORDS_DIFFER}; {_ADVICE}")
            continue
        by_module[_STATIC.get(module, module), kind] = tensor
    return by_module, "pooler" if any(module == HEAD for module, _ in by_module) else None


def _flexible(
    whole: Config, config: Any, tensors: Mapping[str, Array], activation: str, problems: list[str]
) -> tuple[dict[tuple[str, str], Array], str]:
    """The tensors of a named head by module and kind, and the pooling it reads."""
    if not isinstance(config, Mapping):
        problems.append(f"the head's config={config!r}, expected an object with the settings")
        return {}, "cls"
    of_tokens = config.get("head_type") in OF_TOKENS
    layers, pooled = config.get("layers", 2), bool(config.get("use_pooler"))
    rules = {
        **dict.fromkeys(("num_labels", "num_choices"), anything),
        "head_type": one_of(*KINDS),
        "layers": one_of(1) if pooled or of_tokens else one_of(1, 2),
        "activation_function": one_of(activation) if layers == 2 else anything,
        "use_pooler": one_of(True, False),
        "bias": one_of(True),
        "multilabel": one_of(False),
    }
    found = field_problems(config, rules, idle=("label2id", "id2label"))
    problems += [f"the head's {problem}; {_ADVICE}" for problem in found]
    modules = {"1": HEAD} if layers == 1 else {"1": POOLER, "4": HEAD} if layers == 2 else {}
    names = {
        f"heads.{whole.get('name')}.{number}.{kind}": (module, kind)
        for number, module in modules.items()
        for kind in ("weight", "bias")
    }
    if not found and tensors.keys() != names.keys():
        problems.append(f"the head has {sorted(tensors)}, expected {sorted(names)}; {_ADVICE}")
    by_module = {names[key]: tensor for key, tensor in tensors.items() if key in names}
    return by_module, pooling_of(whole)


def pooling_of(whole: Config) -> str:
    """The pooling that a head's settings select: "pooler", "cls" or "tokens".

    Example:
        >>> pooling_of({"config": {"layers": 1, "use_pooler": False}}), pooling_of({})
        ('cls', 'pooler')
        >>> pooling_of({"config": {"use_pooler": False}})  # two layers, as a head has by default
        'pooler'
    """
    config = whole.get("config")
    if not isinstance(config, Mapping):  # a model class's own head
        return "pooler"
    if config.get("head_type") in OF_TOKENS:
        return "tokens"
    return "pooler" if config.get("use_pooler") or config.get("layers", 2) == 2 else "cls"


def write(
    trained: Leaves,
    blocks: Blocks,
    name: str,
    pooling: str | None,
    labels: Sequence[str],
    problems: list[str],
    head_type: str | None = None,
) -> tuple[dict[str, Any], Leaves]:
    """Returns the settings and tensors of a head of a type in `KINDS`; empty if none trains."""
    module_map = blocks.module_map
    modules = {
        path: m
        for m in (HEAD, POOLER)
        for reference in _at(module_map, m)
        for path in (f"{reference.path}/{leaf}" for leaf in reference.leaves)
    }
    problems += [
        f"{path} trains as well, but AdapterHub's files support no base parameters besides a "
        "classification head (houlsby(..., layer_norms=None), or --layer-norms '', freezes the "
        "norms)"
        for path in trained
        if path not in modules
    ]
    mine = {modules[path] for path in trained if path in modules}
    if not mine:
        return {}, {}
    pooled = bool(_at(module_map, POOLER))
    known = pooling or ("pooler" if pooled else None)
    if known not in POOLINGS or not _at(module_map, HEAD) or (known == "pooler") != pooled:
        problems.append(
            "AdapterHub's heads read the pooler or the first token, or each token, but this base's "
            "parameters do not show that its head does; if it reads the first token, give "
            'pooling="cls", if it reads each token, pooling="tokens"'
        )
        return {}, {}
    # A head can read the pooler of a base that has one; otherwise the pooler is its first layer.
    both = POOLER in mine or (known == "pooler" and not blocks.architecture.pooled)
    order = (POOLER, HEAD) if both else (HEAD,)
    tensors: Leaves = {}
    for number, module in zip((1, 4), order, strict=False):
        parts = _at(module_map, module)
        own = parts[0].leaves
        found = their_leaves(parts, own, trained, module_map.base, False, problems)
        tensors |= {f"heads.{name}.{number}.{kind}": x for kind, x in found.items()}
    head_type = head_type or (OF_TOKENS[0] if known == "tokens" else KINDS[0])
    if head_type not in KINDS or (head_type in OF_TOKENS) != (known == "tokens"):
        problems.append(
            f"head_type={head_type!r} with pooling={known!r}, expected {' or '.join(OF_TOKENS)} "
            "for a head that reads tokens, and another one otherwise"
        )
    if head_type == "multiple_choice" and len(labels) < 2:
        problems.append("labels must name the choices of a multiple_choice head")
    return _settings(blocks, head_type, labels, len(order), known == "pooler"), tensors


def _settings(
    blocks: Blocks, head_type: str, labels: Sequence[str], layers: int, pooler: bool
) -> dict[str, Any]:
    """The settings of a head of some layers, which reads the pooler or not."""
    config = {
        "head_type": head_type,
        "num_labels": _at(blocks.module_map, HEAD)[0].width,
        "layers": layers,
        "activation_function": blocks.architecture.pooler,
        "use_pooler": pooler and layers == 1,
        "bias": True,
        "dropout_prob": None,
        "label2id": {label: i for i, label in enumerate(labels)} or None,
    }
    if head_type == "multiple_choice":
        config["num_choices"] = len(labels)
    if head_type == IMAGES:
        config["multilabel"] = False
    # Each kind has its own settings, and AdapterHub takes no others.
    others = {"multiple_choice": ("num_labels", "bias")}
    others |= dict.fromkeys(OF_TOKENS, ("use_pooler", "bias"))
    return {name: x for name, x in config.items() if name not in others.get(head_type, ())}
