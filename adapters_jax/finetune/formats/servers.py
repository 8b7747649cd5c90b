"""What servers of language models load of PEFT's LoRA, and adapters changed into that.

Servers read less than PEFT writes, and some ignore a field without a word: a rank or an alpha of
one module (`rank_pattern`, `alpha_pattern`), or `use_rslora`. So an adapter leaves with one rank
and one alpha, which every one of them reads alike.

- Lower ranks are filled up with zeros, and other scales move into B: the product is the same.
- DoRA and ranks above the limit need an approximation: the nearest change of the rank, by the
  singular values of each weight's change. Its error is stated, and has a limit.

Read in vllm-project/vllm (`vllm/lora/peft_helper.py` at e745baff, which ignores the patterns, and
the later one that reads them; `vllm/lora/lora_model.py` at 0306474e; `MaxLoRARanks` of
`vllm/config/lora.py`; the column LoRA of `docs/models/supported_models.md` at 0046f770), and in
sgl-project/sglang (`python/sglang/srt/lora/lora_config.py` at 0ceb81fe, and `lora_manager.py`).
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from adapters_jax.errors import UserError, check_number, check_size
from adapters_jax.files.layouts import Array, joined, rounded
from adapters_jax.files.module_map import ModuleMap, Names, find_modules
from adapters_jax.files.names import NameTable
from adapters_jax.files.peft.config import KINDS, ROOT, Config, factor_keys, number_at
from adapters_jax.files.peft.convert import from_peft, split_tensors, to_peft
from adapters_jax.methods import Method
from adapters_jax.recipe import Recipe
from adapters_jax.trees import flatten

MERGE = "adapters-jax merge RUN --out DIRECTORY writes a checkpoint that every server loads"
MAX_ERROR = 0.01


@dataclass(frozen=True)
class Server:
    """What a server loads.

    Attributes:
        owner: its name in messages.
        ranks: the limits of the rank that it can be started with, in order; empty for any.
        reads_rank_stabilized: whether it divides alpha by the root of the rank where PEFT does.
        reads_invocation: whether a LoRA can act from its invocation on.
        loads_outer: whether it has LoRA on every base's embedding and output layer, if these are
            not tied.
        model_types: the types of base, as in `config.json`, that it has LoRA for; empty if unknown.
        start: how it is started, with `{}` for the limit of the rank.
    """

    owner: str
    ranks: tuple[int, ...] = ()
    reads_rank_stabilized: bool = False
    reads_invocation: bool = False
    loads_outer: bool = False
    model_types: frozenset[str] = frozenset()
    start: str = ""


SERVERS = {
    "vllm": Server(
        "vLLM",
        ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
        reads_rank_stabilized=True,
        model_types=frozenset(
            {
                *("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2"),
                *("gemma3_text", "phi3", "granite", "olmo2", "smollm3"),
            }
        ),
        start="start it with --enable-lora --max-lora-rank {}",
    ),
    "sglang": Server("SGLang", start="start it with --enable-lora --max-lora-rank {}"),
    "llama.cpp": Server(
        "llama.cpp", reads_invocation=True, loads_outer=True, start="load it with --lora"
    ),
}


class Served(NamedTuple):
    """An adapter that a server loads.

    Attributes:
        notes: sentences about what was changed, and how the server is started.
    """

    recipe: Recipe
    leaves: dict[str, Any]
    notes: list[str]


@dataclass(frozen=True)
class _Pair:
    """The factors of one of PEFT's modules: A `(r, in)`, B `(out, r)`, and DoRA's magnitudes."""

    a: Array
    b: Array
    scale: float
    magnitude: Array | None = None

    @property
    def rank(self) -> int:
        return len(self.a)

    def filled(self, rank: int, scale: float) -> tuple[Array, Array]:
        """A and B of a rank with zeros behind their own, and B for another scale."""
        more = rank - self.rank
        b = self.b if self.scale == scale else self.b * np.float32(self.scale / scale)
        return np.pad(self.a, ((0, more), (0, 0))), np.pad(b, ((0, 0), (0, more)))


def check_decoder(server: Server, kind: str) -> None:
    """Raises UserError if a base is not of the kind "decoder"."""
    if kind != "decoder":
        raise UserError(
            f"{server.owner} takes adapters of decoders, and the base is of the kind {kind}"
        )


def for_server(
    server: Server,
    recipe: Recipe | Method,
    leaves: Mapping[str, Any],
    names: Names,
    base: Any,
    *,
    model_type: str = "",
    rank: int | None = None,
    max_error: float = MAX_ERROR,
    trained: bool = True,
) -> Served:
    """Changes an adapter into one that a server loads, or says before training what that will take.

    Args:
        server: one of `SERVERS`.
        leaves: its leaves by path; those of one that is not trained need shapes alone.
        names, base: as in `load_peft`; of DoRA the base needs its values.
        model_type: the base's type in `config.json`.
        rank: the rank that all modules get; by default the largest that the adapter has.
        max_error: the largest part of a weight's change that may be lost, by the Frobenius norm.
        trained: whether the leaves have their numbers.

    Returns:
        The adapter, with a sentence for each change that it needs, and how the server is started;
        the one that was given, where the server loads that or where it is not trained.

    Raises:
        UserError: the server cannot load it, whatever the numbers are, or at this rank it would
            lose more; the message names every reason, and what to do instead.

    Example:
        >>> import adapters_jax as aj
        >>> base = {name: {"kernel": np.ones((6, 4))} for name in ("query", "value")}
        >>> leaves = {
        ...     f"{name}/lora/{factor}": np.ones(shape)
        ...     for name, r in (("query", 1), ("value", 2))
        ...     for factor, shape in (("a", (6, r)), ("b", (r, 4)))}
        >>> recipe = aj.LoRA(("query", "value"), 1, rank_pattern={"value": 2})
        >>> names = {"q_proj": "query", "v_proj": "value"}
        >>> served = for_server(SERVERS["vllm"], recipe, leaves, names, base)
        >>> for note in served.notes:
        ...     print(note)
        vLLM gets one rank, 2, for the ranks 1 and 2: zeros fill them up, and no output changes
        start it with --enable-lora --max-lora-rank 8

    Reference: Eckart and Young 1936, "The approximation of one matrix by another of lower rank".
    """
    check_number("for_server", "max_error", max_error, low=0.0, high=1.0)
    arrays = {path: np.asarray(leaf) for path, leaf in leaves.items()}
    if isinstance(names, NameTable):
        names = names.of_version(4)  # servers have the modules that checkpoints have
    config, tensors, problems = to_peft(recipe, arrays, names, base)
    module_map = find_modules(names, base)
    problems = [*problems, *_problems(server, config, tensors, module_map)]
    if model_type and server.model_types and model_type not in server.model_types:
        supported = ", ".join(sorted(server.model_types))
        problems.append(f"it has LoRA for bases of the types {supported}, and not for {model_type}")
    if problems:
        # Of an activated LoRA there is no merged checkpoint.
        problems += [] if config.get("alora_invocation_tokens") else [MERGE]
        raise UserError(f"{server.owner} cannot load this adapter: {'; '.join(problems)}")
    pairs = {}
    for name, factors in _factors(tensors).items():
        own, alpha = number_at(config, "r", name), number_at(config, "lora_alpha", name)
        scale = alpha / (math.sqrt(own) if config["use_rslora"] else own)
        pairs[name] = _Pair(scale=scale, **factors)
    rank = _chosen(server, pairs, rank)
    notes = _changes(server, config, pairs, rank)
    limits = (limit for limit in server.ranks if limit >= rank)
    start = server.start.format(next(limits, rank))
    if not notes or not trained:
        return Served(Recipe(recipe), dict(leaves), [*notes, start])
    made, lost = dict[str, _Pair](), dict[str, _Lost]()
    for name, pair in pairs.items():
        if pair.magnitude is None and pair.rank <= rank:
            made[name] = pair
        else:
            made[name], lost[name] = _nearest(name, pair, rank, module_map)
    if lost:
        notes.append(_stated(server, lost, rank, max_error))
    usual = Counter(pair.scale for pair in made.values()).most_common(1)[0][0]
    written: dict[str, Array] = {}
    for name, pair in made.items():
        keys = factor_keys(name, of_embedding=factor_keys(name, True)[0] in tensors)
        written |= zip(keys, pair.filled(rank, usual), strict=True)
    plain = {"use_dora": False, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    config = {**config, **plain, "r": rank, "lora_alpha": rounded(usual * rank)}
    found, tree = from_peft(config, written, names, base, f"for {server.owner}")
    return Served(found, flatten(tree), [*notes, start])


def _chosen(server: Server, pairs: Mapping[str, _Pair], rank: int | None) -> int:
    """The rank that all modules get."""
    largest = max(pair.rank for pair in pairs.values())
    most = server.ranks[-1] if server.ranks else max(rank or 0, largest)
    chosen = min(largest, most) if rank is None else rank
    check_size(server.owner, "rank", chosen)
    if chosen > most:
        raise UserError(f"{server.owner}: rank {chosen}, expected at most {most}")
    return chosen


def _changes(server: Server, config: Config, pairs: Mapping[str, _Pair], rank: int) -> list[str]:
    """A sentence for each change that an adapter needs."""
    owner, found, ranks = server.owner, [], sorted({pair.rank for pair in pairs.values()})
    shown = f"{', '.join(map(str, ranks[:-1]))} and {ranks[-1]}" if ranks[1:] else str(ranks[0])
    if config["use_dora"]:
        found.append(f"{owner} has no DoRA: each change becomes LoRA of rank {rank}")
    elif ranks[-1] > rank:
        found.append(f"{owner} gets rank {rank} for {shown}: the nearest changes of it")
    elif ranks != [rank]:
        found.append(
            f"{owner} gets one rank, {rank}, for the ranks {shown}: zeros fill them up, and no "
            "output changes"
        )
    if len({pair.scale for pair in pairs.values()}) > 1:
        found.append(f"{owner} gets one alpha: scales that differ are in B")
    if config["use_rslora"] and not (server.reads_rank_stabilized and not found):
        found.append(f"{owner} gets alpha / r with the value of rsLoRA's alpha / sqrt(r)")
    return found


def _problems(
    server: Server, config: Config, tensors: Mapping[str, Array], module_map: ModuleMap
) -> list[str]:
    """Why a server cannot load an adapter at all, whatever its rank."""
    if not config:
        return []  # PEFT itself cannot hold this adapter
    if config["peft_type"] != "LORA":
        return [f"it loads LoRA, and this is {config['peft_type']}"]
    found = []
    if config.get("alora_invocation_tokens") and not server.reads_invocation:
        found.append("it would apply an activated LoRA to all tokens, not from its invocation on")
    if saved := config.get("modules_to_save"):
        found.append(f"it has no trained {', '.join(saved)} beside LoRA (--no-head leaves a head)")
    if config.get("bias", "none") != "none":
        found.append("it has no trained biases beside LoRA")
    if parameters := config.get("target_parameters"):
        found.append(f"it has no LoRA on parameters such as {parameters[0]}")
    names = _factors(tensors)
    outer = [] if server.loads_outer and not module_map.tied else _outer(tensors, module_map)
    for kind, wrong in (
        ("experts", [name for name in names if ".experts." in name]),
        ("convolutions", [name for name, own in names.items() if own["a"].ndim != 2]),
        ("a tied embedding" if module_map.tied else "embeddings and output layers", outer),
    ):
        if wrong:
            found.append(f"it does not load LoRA on {kind}, such as {wrong[0]}, for every base")
    return found


def _outer(tensors: Mapping[str, Array], module_map: ModuleMap) -> list[str]:
    """The embeddings and output layers that have factors."""
    heads = module_map.tied[:1] if module_map.tied else module_map.table.heads
    ends = (".lora_embedding_A", *(f"{head}.lora_A.weight" for head in heads))
    return [key.removeprefix(ROOT) for key in tensors if key.endswith(ends)]


def _factors(tensors: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
    """The factors by PEFT's names of modules."""
    return split_tensors(tensors, KINDS["LORA"], [])[0]


class _Lost(NamedTuple):
    """What a module loses at a rank: parts of its change, for each rank, and of its weight."""

    by_rank: Array
    of_weight: float | None


def _nearest(name: str, pair: _Pair, rank: int, module_map: ModuleMap) -> tuple[_Pair, _Lost]:
    """The change of a module at a rank, and what it loses."""
    a, b = pair.a.astype(np.float64), pair.scale * pair.b.astype(np.float64)
    size = None
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise UserError(f"{name} has numbers that are not finite; train the adapter again")
    if pair.magnitude is None:
        (left, first), (right, last) = np.linalg.qr(b), np.linalg.qr(a.T)
        u, s, v = np.linalg.svd(first @ last.T)
        u, v = left @ u, v @ right.T
    else:
        weight = _weight(name, a.shape[1], module_map)
        changed = weight + b @ a
        norms = np.linalg.norm(changed, axis=1, keepdims=True)
        whole = pair.magnitude.reshape(-1, 1) * changed / np.where(norms, norms, 1.0)
        u, s, v = np.linalg.svd(whole - weight, full_matrices=False)
        size = np.linalg.norm(whole)
    tails = np.sqrt(np.append(np.cumsum(s[::-1] ** 2)[::-1], 0.0))  # by the rank that is kept
    lost = tails / tails[0] if tails[0] else tails
    root, last_one = np.sqrt(s[:rank]), min(rank, len(s))
    made = _Pair(
        (root[:, None] * v[:rank]).astype(np.float32), (u[:, :rank] * root).astype(np.float32), 1.0
    )
    return made, _Lost(lost, None if size is None else float(tails[last_one] / size))


def _weight(name: str, inputs: int, module_map: ModuleMap) -> Array:
    """A base's weight as PyTorch has it, `(out, in)`."""
    parts = [own.leaves[own.weight] for own in module_map.at(name)]
    if not all(hasattr(part, "__array__") for part in parts):
        raise UserError(f"{name}: DoRA changes the base's weight; give a base with its values")
    arrays = [np.asarray(part, np.float64).reshape(inputs, -1) for part in parts]
    return joined(arrays, module_map.at(name)[0].blocks).T


def _stated(server: Server, lost: Mapping[str, _Lost], rank: int, max_error: float) -> str:
    """A sentence about what a rank loses; raises UserError if that is more than `max_error`."""
    at = {name: own.by_rank[min(rank, len(own.by_rank) - 1)] for name, own in lost.items()}
    worst = max(at, key=at.__getitem__)
    of_weight = lost[worst].of_weight
    beside = "" if of_weight is None else f", which is {of_weight:.2g} of the weight,"
    if at[worst] > max_error:
        enough = max(int(np.argmax(own.by_rank <= max_error)) for own in lost.values())
        fits = not server.ranks or enough <= server.ranks[-1]
        more = f"take --rank {enough}, or " if fits else ""
        raise UserError(
            f"for {server.owner}, {worst} loses {at[worst]:.3g} of its change{beside} at rank "
            f"{rank}, expected at most {max_error:g}; {more}accept the loss: --max-error "
            f"{math.ceil(1000 * at[worst]) / 1000:g}; or {MERGE}"
        )
    return f"at rank {rank} it loses at most {at[worst]:.3g} of a change{beside} at {worst}"
