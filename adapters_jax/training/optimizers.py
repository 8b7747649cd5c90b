"""Optimisers of what a recipe trains: the frozen rest gets no updates and no state."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import optax

from adapters_jax.errors import RecipeError, TargetError, UserError, check_number, shown
from adapters_jax.methods import LoRA, Method
from adapters_jax.recipe import Recipe
from adapters_jax.targets import matches, require_match
from adapters_jax.trees import Tree, path_of


def check_optimizer(caller: str, tx: Any) -> None:
    """Raises UserError where an argument is not an optax optimiser."""
    if not callable(getattr(tx, "init", None)) or not callable(getattr(tx, "update", None)):
        raise UserError(
            f"{caller}: tx={shown(tx)}, expected an optax optimiser, such as optax.adam(1e-4)"
        )


def freeze_base(
    tx: optax.GradientTransformation,
    recipe: Recipe | Method,
    groups: Mapping[str, optax.GradientTransformation] | None = None,
) -> optax.GradientTransformation:
    """An optimiser that updates what the recipe trains and nothing else of the tree.

    It is `optax.multi_transform` with labels by path: `tx` for trained leaves, zero updates and no
    state for frozen ones. It takes a whole parameter tree, the trained part alone, or an NNX state.

    Args:
        tx: the optimiser of trained leaves.
        recipe: says what trains.
        groups: other optimisers for some trained leaves, by pattern of the parameter's path; the
            first match wins: `{"**/lora/b": optax.adamw(2e-3)}`.

    Returns:
        A gradient transformation.

    Raises:
        UserError: `tx` or a group's is not an optimiser.
        RecipeError: `init` of the result raises it where an entry that trains has no parameters.
        TargetError: `init` of the result raises it where a group's pattern matches no trained leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> from adapters_jax import Unfreeze
        >>> params = {"head": {"bias": jnp.ones(2)}, "body": {"bias": jnp.ones(2)}}
        >>> frozen = freeze_base(optax.sgd(0.5), Unfreeze("head/*"))
        >>> updates, _ = frozen.update(params, frozen.init(params), params)
        >>> float(updates["head"]["bias"][0]), float(updates["body"]["bias"][0])
        (-0.5, 0.0)
    """
    check_optimizer("freeze_base", tx)
    recipe, groups = Recipe(recipe), dict(groups or {})
    for pattern, group_tx in groups.items():
        check_optimizer(f"freeze_base groups {pattern!r}", group_tx)

    def group_of(path: str) -> str | None:
        return next((pattern for pattern in groups if matches(pattern, path)), None)

    def check(paths: Iterable[str]) -> None:
        require_match("freeze_base groups", tuple(groups), paths)

    return _in_groups(tx, recipe, groups, group_of, check)


def _in_groups(
    tx: optax.GradientTransformation,
    recipe: Recipe,
    groups: Mapping[str, optax.GradientTransformation],
    group_of: Callable[[str], str | None],
    check: Callable[[Iterable[str]], None],
) -> optax.GradientTransformation:
    """`freeze_base` with groups of any kind.

    Args:
        tx: the optimiser of trained leaves without a group.
        groups: the optimisers of the groups by name.
        group_of: the name of the group of a trained leaf, by its path; None without one.
        check: raises an error where the paths of trained leaves lack a group.
    """

    def label(key_path: tuple[Any, ...], _: Any) -> str:
        path = path_of(key_path)
        if not recipe.trains(path):
            return "base"
        group = group_of(path)
        return "adapter" if group is None else f"group {group}"

    def labels(params: Tree) -> Tree:
        # A function of the tree, as optax allows for labels: `init` and `update` may get the whole
        # tree, the trained part, or an NNX state.
        return jax.tree_util.tree_map_with_path(label, params)

    own = {f"group {name}": group_tx for name, group_tx in groups.items()}
    transform = optax.multi_transform({"adapter": tx, "base": optax.set_to_zero(), **own}, labels)

    def init(params: Tree) -> optax.OptState:
        paths = [path_of(key_path) for key_path, _ in jax.tree_util.tree_leaves_with_path(params)]
        absent = recipe.absent(paths, trained=True)
        if absent and not _is_part(params):
            raise RecipeError(
                f"freeze_base: the parameters hold nothing of {absent}; pass what "
                "aj.init_adapters(model, params, key, *example_inputs) returned"
            )
        check(recipe.trained(paths))
        return transform.init(params)

    # With extra arguments, which optimisers such as L-BFGS ask for, passed on.
    return optax.GradientTransformationExtraArgs(init, transform.update)


def _is_part(params: Tree) -> bool:
    """Whether optax left out leaves of the tree, which other optimisers then have."""
    # `optax.masked` and `multi_transform` put these nodes in the place of leaves that they do not
    # pass on.
    nodes = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    return any(isinstance(node, optax.MaskedNode) for node in nodes)


def lora_plus(
    optimizer: Callable[..., optax.GradientTransformation],
    learning_rate: optax.ScalarOrSchedule,
    recipe: Recipe | Method,
    *,
    ratio: float = 16.0,
    **options: Any,
) -> optax.GradientTransformation:
    """LoRA+: B learns at a higher rate than A and all else.

    Args:
        optimizer: makes an optimiser of a learning rate, such as `optax.adamw`.
        learning_rate: of A and of everything else that trains; a number or a schedule.
        recipe: says what trains.
        ratio: the rate of B over that of A; 16 in the paper's code, larger than 1.
        **options: further arguments of the optimiser.

    Returns:
        `freeze_base` with a group for B.

    Raises:
        UserError: `optimizer` is not a function, the ratio is not a positive number, or the
            learning rate is negative, not finite or no number.
        TargetError: `init` of the result raises it where no B trains.

    Example:
        >>> import jax.numpy as jnp
        >>> from adapters_jax import LoRA
        >>> params = {"query": {"lora": {"a": jnp.ones(1), "b": jnp.ones(1)}}}
        >>> tx = lora_plus(optax.sgd, 0.25, LoRA("query", 1), ratio=4.0)
        >>> updates, _ = tx.update(params, tx.init(params), params)
        >>> float(updates["query"]["lora"]["a"][0]), float(updates["query"]["lora"]["b"][0])
        (-0.25, -1.0)

    Reference: Hayou et al. 2024, arXiv:2402.12354.
    """
    if not callable(optimizer):
        raise UserError(
            f"lora_plus: optimizer is a {type(optimizer).__name__}, expected a function of a "
            "learning rate; write aj.lora_plus(optax.adamw, 1e-4, recipe)"
        )
    check_number("lora_plus", "ratio", ratio)
    # An array may be traced, as under `optax.inject_hyperparams`, and has no value to check then.
    if not callable(learning_rate) and not isinstance(learning_rate, jax.Array):
        check_number("lora_plus", "learning_rate", learning_rate, closed=True)
    if callable(learning_rate):
        schedule = learning_rate
        faster: optax.ScalarOrSchedule = lambda step: ratio * schedule(step)  # noqa: E731
    else:
        faster = ratio * learning_rate
    recipe = Recipe(recipe)

    def group_of(path: str) -> str | None:
        owner = recipe.owner(path)  # by its method: nodes between the slot and B have any name
        return "B" if owner and isinstance(owner.method, LoRA) and owner.name == "b" else None

    def check(paths: Iterable[str]) -> None:
        if not any(map(group_of, paths)):
            raise TargetError("lora_plus: no B of LoRA trains; give a recipe with aj.LoRA")

    tx = optimizer(learning_rate, **options)
    check_optimizer("lora_plus", tx)
    return _in_groups(tx, recipe, {"B": optimizer(faster, **options)}, group_of, check)
