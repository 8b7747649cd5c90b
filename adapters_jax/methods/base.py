"""The contract of a method: the members that the rest of the library uses, and no others.

Both APIs, counting, files, merging, combining, sharding and layer stacking use these members
alone, so a method of another package can do everything that a built-in one does.
`adapters_jax.testing.check_method` tests it.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array

from adapters_jax.errors import RecipeError, UserError, check_flag, other_names
from adapters_jax.methods.arrays import Initializer, Key, Output, Shape, Shapes, Weight, over_layers
from adapters_jax.methods.settings import check_fields, check_name, settings_of
from adapters_jax.targets import as_patterns
from adapters_jax.trace.heads import Inline
from adapters_jax.trace.registry import Attention, AttentionFn
from adapters_jax.weights.axes import Axes
from adapters_jax.weights.quantized import is_quantized

Leaves = Mapping[str, Any]
Kind = Literal["output", "attention", "weight"]  # of what a method adapts


@dataclass(frozen=True)
class AttachmentPoint:
    """What a method adapts in a model: the output of a module, its attention, or a weight in it.

    Attributes:
        kind: "output", "attention" or "weight": what the method's `acts_on` says.
        path: the path of the target, which the patterns of settings such as `rank_pattern` match:
            of the module; or of the weight, where several of the module's are adapted, or where the
            recipe names it.
        own: the shapes of all of the module's own leaves by name, with layer axes.
        precision: matmul precision of the module.
        width: of an output, the size of its last axis, d.
        attention: of an attention, its sizes; None in the calls of modules that compute it in line,
            until they come to it.
        weight: of a weight, its name in the module.
        axes: of a weight, the roles of its axes.
        biases: of a weight, the names of the module's leaves that are added to its products; None
            where no run of the model showed it.

    Example:
        >>> point = AttachmentPoint("weight", "up", {"kernel": (8, 32)}, weight="kernel")
        >>> point.weight_shape
        (8, 32)
    """

    kind: Kind
    path: str
    # A mapping of shapes cannot be hashed, so points are made anew and never static arguments of
    # jit.
    own: Shapes = field(default_factory=dict)
    precision: Any = None
    width: int = 0
    attention: Attention | None = None
    weight: str = ""
    axes: Axes = field(default=Axes((), ()))
    biases: tuple[str, ...] | None = ()

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the weight, with layer axes."""
        return self.own[self.weight]


@dataclass(frozen=True)
class Leaf:
    """One array that a method adds.

    Attributes:
        shape: its shape, without layer axes.
        init: its initialiser, `init(key, shape)`, which returns float32.

    Example:
        >>> Leaf((4, 2), lambda key, shape: jnp.zeros(shape)).shape
        (4, 2)
    """

    shape: tuple[int, ...]
    init: Initializer


@dataclass(frozen=True)
class Count:
    """How many parameters a method adds at one attachment point, as a closed form and its value.

    Attributes:
        formula: the closed form with its numbers, `2*768*64 + 64 + 768`.
        parameters: its value for one layer.
        copies: how many layers are stacked in the leaves.

    Example:
        >>> Count("2*768*64 + 64 + 768", 2 * 768 * 64 + 64 + 768).parameters
        99136
    """

    formula: str
    parameters: int
    copies: int = 1

    @classmethod
    def of(cls, shapes: Iterable[tuple[int, ...]], layers: Iterable[int] = ()) -> "Count":
        """The count of arrays with these shapes, which are stacked on layer axes.

        Example:
            >>> Count.of([(768, 64), (64,), (64, 768), (768,)], layers=(12,))
            Count(formula='2*768*64 + 768 + 64', parameters=99136, copies=12)
        """
        # Arrays of one size are one term, whatever the order of their axes.
        sizes = Counter(tuple(sorted(s for s in shape if s != 1)) for shape in shapes)
        terms = [
            "*".join(map(str, (*[n] * (n > 1), *reversed(size)))) or "1"
            for size, n in sorted(
                sizes.items(), key=lambda x: (len(x[0]), x[0][::-1]), reverse=True
            )
        ]
        total = sum(n * math.prod(size) for size, n in sizes.items())
        return cls(" + ".join(terms) or "0", total, math.prod(layers))


@dataclass(frozen=True)
class Method:
    """A way to adapt a model. Derive a class from it, and register the class.

    A method is a frozen dataclass whose fields are its settings: JSON values, and tuples of them.
    It holds no arrays. Its arrays, the leaves, are in the parameter tree beside those of the module
    that it adapts, under the name `slot`: `layer_0/query/SLOT/LEAF`. Leaves are float32; `forward`
    casts them to the dtype of the module's output and returns that dtype. Scanned layers have
    leaves with the layer axes in front, which only `count` sees.

    A method without a slot (`slot = None`) adds nothing: it trains the base's own parameters whose
    paths its targets match, as `Unfreeze` does, and needs only a kind.

    Where a recipe's entry has a `name`, its leaves are under `SLOT_NAME`, so that several methods
    of one class can be on one module. With `train=False` they do not train, and are never
    initialised: they come from a file or from parameters that have them.

    Required of the others:
        kind: its name in the JSON of recipes; no two methods have the same.
        slot: see above; a subclass of a method may share its slot.
        leaf_names: the names of the leaves, `"scale"` or `"down/kernel"`; a class variable or a
            property. Every attachment point has all of them.
        leaves(point): a `Leaf` for each name.
        count(path, shapes, weight): the closed form of the parameters at one module, computed
            from the settings; the audit compares it with the arrays. Or, of a method on outputs,
            width_of(shapes): the width of the output by the arrays, from which `count` follows.
        forward(leaves, point, x, y, key): the module's output with the method. Methods
            that act inside attention modules have `acts_on = "attention"`, `attend` and
            `attend_inline` instead, as `Prompt` has; methods that change weights derive from
            `LeafMethod` and have `changes`.

    Optional:
        frozen_leaves: the names of leaves that do not train, such as random projections. They are
            in files, and counted apart.
        gated: whether calls say where it acts, by `invoked=`; `changes` then gets that as
            `leaves["invoked"]`.
        also: the other classes whose adapters a bank takes where its recipe has this one.
        shared_leaves: the names of leaves that all modules of a recipe's entry have in common. They
            are stored once, at the top of the tree, `SLOT/LEAF`, without layer axes; every module
            must ask for one shape. At least one leaf is a module's own. `count` is of the leaves
            that are neither frozen nor shared.
        cut_leaves: those shared ones that are as large as the largest that a module asks for; each
            module gets all of it, and uses what it needs.
        fits(point): whether it can attach to an output or attention; by default, to all. It is
            called for those of every module, targeted or not.
        stated: fields that JSON must have; other fields have their defaults where it lacks them.
        dropout: a probability; `forward` gets a key only where it is above zero, while training.
        output: the path of the output that `forward` acts on, where modules return several.
        changes_input: whether `forward` gives another input of the module, not its output; the
            module then runs again.
        branch(leaves, point, x, y, key): what `forward` adds, for `aj.fuse`.
        members, compose(leaves, point, run, state, key): of a composition, the names of the entries
            that it runs.
        why_not(module): why `fits` is false, for the error about a target that cannot be adapted.
        merged(leaves, point, own): the module's own parameters with the change in them.
        unmergeable: why there is no `merged`.
        inverse(leaves, point): leaves whose `merged` undoes that of the given ones.
        factors(leaves, path): the change of the weight as a product of two, for `aj.combine`.
        from_weight, start(leaves, point, weight): leaves that depend on the module's weight.
        from_inputs: whether `start` also gets statistics of the weight's inputs.
        quantized(leaves, point, weight, quantize): leaves that depend on both of its weights, where
            an adapted model is quantised.
        unready(leaves): why leaves cannot train yet, which `TrainState.create` asks.
        neutral(leaves): leaves that leave the base as it is; a bank of adapters needs them.
            `neutral = zeros` where zeros do.
        size(leaves), fitted(leaves, path, whole), size_fields: what may differ in a bank.
        pattern_fields: fields of (pattern, value) pairs, each with the field that it overrides.
        subset_fields: fields of patterns that match some of the targets.
        paper: the number on arXiv of the paper that proposed it, which a run's page cites.

    Args:
        targets: patterns of module paths.
        name: the name of this adapter, of letters, digits and underscores; by keyword.
        train: whether its leaves train; by keyword.

    Raises:
        TargetError: `targets` are no patterns.
        UserError: a setting has the name that another library gives it, or `name` is not allowed.

    Example:
        >>> import jax, jax.numpy as jnp, adapters_jax as aj
        >>> from dataclasses import dataclass
        >>> from flax import linen as nn
        >>> from adapters_jax.methods import Count, Leaf, arrays
        >>> @aj.register_method
        ... @dataclass(frozen=True)
        ... class Gain(aj.Method):
        ...     '''Multiplies every output by a trained number.'''
        ...     kind, slot, leaf_names = "docs_gain", "docs_gain", ("scale",)
        ...     def leaves(self, point):
        ...         return {"scale": Leaf((point.width,), arrays.ones)}
        ...     def count(self, path, shapes, weight):
        ...         *layers, d = shapes["scale"]
        ...         return Count(f"{d}", d, copies=layers[0] if layers else 1)
        ...     def forward(self, leaves, point, x, y, key=None):
        ...         return y * arrays.beside(leaves["scale"].astype(y.dtype), y)
        >>> model = aj.adapt(nn.Dense(3), Gain("**"))
        >>> params = nn.Dense(3).init(jax.random.key(0), jnp.ones((1, 4)))["params"]
        >>> params = aj.init_adapters(model, params, jax.random.key(1), jnp.ones((1, 4)))
        >>> aj.audit(model, params).adapter_parameters
        3
        >>> aj.Recipe.from_json(aj.Recipe(Gain("**")).to_json()) == aj.Recipe(Gain("**"))
        True
    """

    kind: ClassVar[str]
    slot: ClassVar[Any]  # a name, or None; an entry with a name has the slot `SLOT_NAME`
    stated: ClassVar[tuple[str, ...]] = ("targets",)
    acts_on: ClassVar[Kind] = "output"
    unmergeable: ClassVar[str] = "it defines no `merged`"
    paper: ClassVar[str] = ""
    size_fields: ClassVar[tuple[str, ...]] = ()
    pattern_fields: ClassVar[Mapping[str, str]] = {}
    subset_fields: ClassVar[tuple[str, ...]] = ()
    frozen_leaves: ClassVar[tuple[str, ...]] = ()
    shared_leaves: ClassVar[tuple[str, ...]] = ()
    members: ClassVar[Any] = ()  # names; a field of compositions
    cut_leaves: ClassVar[tuple[str, ...]] = ()
    gated: ClassVar[bool] = False
    also: ClassVar[tuple[type["Method"], ...]] = ()

    targets: str | tuple[str, ...]
    name: str = field(default="", kw_only=True, repr=False, metadata={"check": check_name})
    train: bool = field(default=True, kw_only=True, repr=False, metadata={"check": check_flag})

    def __new__(cls, *args: Any, **settings: Any) -> "Method":
        """Makes the method; raises UserError for settings in another library's spelling."""
        # In `__new__`, since the `__init__` that dataclasses write would raise before anything of
        # ours ran, without knowing the names of other libraries.
        if not settings.keys() <= cls.__dataclass_fields__.keys():  # dataclasses report the rest
            other_names().check_settings(cls.__name__, cls.__dataclass_fields__, settings)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", as_patterns(self.targets, type(self).__name__))
        check_fields(self)
        if self.slot is None and (self.name or not self.train):
            raise UserError(
                f"{type(self).__name__}: name={self.name!r}, train={self.train}, and it adds "
                "nothing that has a name or could be frozen; leave both out"
            )
        apart = {*self.frozen_leaves, *self.shared_leaves}
        nested = any("/" in name for name in self.shared_leaves)
        if self.shared_leaves and not self.own_leaves:
            raise RecipeError(
                f"{type(self).__name__}: with these settings modules share every array, "
                f"shared_leaves={self.shared_leaves}; leave out at least one of them"
            )
        if apart and (nested or not apart <= {*self.leaf_names}):
            raise RecipeError(
                f"{type(self).__name__}: frozen_leaves={self.frozen_leaves} and shared_leaves="
                f"{self.shared_leaves}, expected some of {self.leaf_names}, shared ones without a "
                "slash"
            )
        if self.name:
            object.__setattr__(self, "slot", f"{type(self).slot}_{self.name}")

    def __str__(self) -> str:
        """Its class and settings, a name among them, without those that have their default."""
        return f"{type(self).__name__}({', '.join(settings_of(self))})"

    def __add__(self, other: Any) -> Any:
        """Raises TypeError for two methods, which alone are no recipe; a recipe adds methods."""
        if isinstance(other, Method):
            names = f"{type(self).__name__}(...), {type(other).__name__}(...)"
            raise TypeError(f"two methods are added; write aj.Recipe({names})")
        # Python then asks the other side, so that `method + recipe` reaches `Recipe.__radd__`.
        return NotImplemented

    @property
    def leaf_names(self) -> tuple[str, ...]:
        """The names of its leaves."""
        return ()

    @property
    def own_leaves(self) -> tuple[str, ...]:
        """The names of the leaves that each module has for itself."""
        return tuple(name for name in self.leaf_names if name not in self.shared_leaves)

    def trains(self, name: str) -> bool:
        """Whether a leaf trains."""
        return self.train and name not in self.frozen_leaves

    def path_of(self, prefix: str, name: str) -> str:
        """The path of a leaf; `prefix` is that of the node that holds a module's own leaves."""
        return f"{self.slot if name in self.shared_leaves else prefix}/{name}"

    @property
    def dropout(self) -> float:
        """The probability of its dropout."""
        return 0.0

    @property
    def output(self) -> str | None:
        """The path of the output that it acts on, `"1"`; None for the one that is plainly meant."""
        return None

    @property
    def changes_input(self) -> bool:
        """Whether `forward` gives another input of the module, which then runs again."""
        return False

    @property
    def from_weight(self) -> Literal["", "reads", "changes"]:
        """Whether `start` "reads" the weight, "changes" it as well, or is not called: ""."""
        return ""

    @property
    def from_inputs(self) -> bool:
        """Whether `start` takes what `aj.calibrate` saw of the weight's inputs, `inputs=`."""
        return False

    @property
    def other_starts(self) -> str:
        """Where `from_weight` is "changes": the settings whose `start` leaves the weight."""
        return ""

    def fits(self, point: AttachmentPoint) -> bool:
        """Whether the method can attach to an output or an attention."""
        return True

    def why_not(self, module: Any) -> str:
        """Why the method cannot attach to a module, as the end of a sentence."""
        return f"{type(self).__name__} does not fit {type(module).__name__}"

    def leaves(self, point: AttachmentPoint) -> dict[str, Leaf]:
        """The arrays that the method adds to a module, by name.

        Raises:
            RecipeError: the settings do not fit the sizes of the module.
        """
        return {}

    def count(self, path: str, shapes: Shapes, weight: Shape) -> Count:
        """The closed form of the parameters that the method adds to one module.

        Args:
            path: path of the module.
            shapes: shapes of the leaves by name, with layer axes.
            weight: shape of the module's weight, with layer axes; empty where it has none.
        """
        if not self.own_leaves:
            return Count("0", 0)
        point = AttachmentPoint(self.acts_on, path, width=self.width_of(shapes))
        own, first = self.leaves(point), self.own_leaves[0]
        counted = [own[n].shape for n in self.own_leaves if n not in self.frozen_leaves]
        return Count.of(counted, shapes[first][: len(shapes[first]) - len(own[first].shape)])

    def width_of(self, shapes: Shapes) -> int:
        """The width of the output for which the leaves have these shapes, for `count`."""
        raise NotImplementedError

    def forward(
        self, leaves: Leaves, point: AttachmentPoint, x: Any, y: Output, key: Key = None
    ) -> Output:
        """The module's output with the method.

        Args:
            leaves: the arrays by name.
            point: the module that they adapt.
            x: the module's input, of whatever form the module takes.
            y: the module's output, with the methods before this one; of several the one that the
                method acts on.
            key: for dropout while training; None in evaluation.

        Returns:
            An array of the shape and dtype of y; of x, where `changes_input` is true.
        """
        return y

    def branch(
        self, leaves: Leaves, point: AttachmentPoint, x: Any, y: Output, key: Key = None
    ) -> Output:
        """What `forward` adds to the output, or to the input where `changes_input` is true.

        Where a class defines it, it is called in place of `forward`.
        """
        raise NotImplementedError

    def compose(
        self,
        leaves: Leaves,
        point: AttachmentPoint,
        run: Callable[[str, Any], Any],
        state: Any,
        key: Key = None,
    ) -> Any:
        """What a composition makes of a `methods.outputs.State`, where `members` is not empty.

        Args:
            leaves, point, key: as in `forward`.
            run: `run(member, state)` is the state after a member; None where the module lacks it.
            state: the module's input and output, with the entries before this one.
        """
        return state

    def attend(
        self,
        leaves: Leaves,
        point: AttachmentPoint,
        project: Callable[[str, Array], Array],
        attention_fn: AttentionFn,
        *args: Any,
        **kwargs: Any,
    ) -> Array:
        """The output of an attention function with the method, where `acts_on = "attention"`.

        Args:
            leaves, point: as in `forward`.
            project: `project("key", x)` is the module's own projection of x, (K, d).
            attention_fn: the module's attention function, with the methods before this one.
            *args: arguments of `attention_fn`: query, key and value first.
            **kwargs: further ones; a `mask` is an array or an `adapters_jax.trace.masks.Mask`.
        """
        return attention_fn(*args, **kwargs)

    def attend_inline(
        self, leaves: Leaves, point: AttachmentPoint, inline: Inline, mixed: Array
    ) -> Array:
        """The output of an attention that its module computes in line, with the method.

        Args:
            leaves, point: as in `forward`.
            inline: what the attention reads.
            mixed: its output before the output projection, (..., heads, head_dim).
        """
        return mixed

    def merged(
        self, leaves: Leaves, point: AttachmentPoint, own: Mapping[str, Array]
    ) -> dict[str, Array]:
        """The module's own parameters that the method changes, with its change in them.

        With them the module alone computes what `forward` returns. Arrays have no layer axes; sums
        and products are taken in float32 and cast once to the parameter's dtype.

        Args:
            leaves, point: as in `forward`.
            own: the module's own parameters by name.

        Raises:
            RecipeError: the method cannot be merged into parameters.
        """
        raise RecipeError(
            f"merge: {type(self).__name__} cannot be folded into a weight at {point.path!r}, since "
            f"{self.unmergeable}; keep the adapted model, or merge a recipe without it"
        )

    def inverse(self, leaves: Leaves, point: AttachmentPoint) -> Leaves:
        """Leaves whose `merged` undoes the `merged` of the given ones.

        Raises:
            RecipeError: the method has no inverse.
        """
        raise RecipeError(
            f"unmerge: {type(self).__name__} at {point.path!r} has no inverse; start from the base "
            "that you kept"
        )

    def neutral(self, leaves: Leaves) -> dict[str, Array]:
        """Leaves of the same shapes that make the method leave the base as it is.

        They may have layer axes. Where `from_weight` is "reads", `start` is called on them.

        Raises:
            RecipeError: no leaves do that, so that a bank cannot hold the method.
        """
        raise RecipeError(
            f"Bank: {type(self).__name__} defines no `neutral`, which rows without an adapter need "
            "to compute what the base does; leave it out of the bank's recipe"
        )

    def size(self, leaves: Leaves) -> int | None:
        """The size that may differ between the adapters of a bank, such as a rank; else None."""
        return None

    def fitted(self, leaves: Leaves, path: str, whole: "Method") -> dict[str, Array]:
        """Leaves which, padded with zeros, compute with `whole` what these compute with `self`.

        Args:
            leaves: the arrays by name.
            path: path of the target.
            whole: a method of the same class, equal in all fields but targets and `size_fields`.

        Raises:
            RecipeError: no leaves compute that.
        """
        return dict(leaves)

    def factors(self, leaves: Leaves, path: str) -> tuple[Array, Array]:
        """A and B in float32, whose product is the change of the weight at a path.

        Raises:
            RecipeError: the change is not a product of two factors.
        """
        raise RecipeError(
            f"combine: {type(self).__name__} at {path!r} changes no weight by a product A B; "
            "combine recipes of LoRA alone"
        )

    def start(
        self, leaves: Leaves, point: AttachmentPoint, weight: Weight
    ) -> tuple[dict[str, Array], Array]:
        """The initial leaves given the module's weight, and the weight to keep in the base.

        Called where `from_weight` is not "", and where `from_inputs` is true, then with `inputs=`,
        a `methods.calibration.Inputs`, or without where a file brings the leaves.
        """
        return dict(leaves), weight

    def quantized(
        self,
        leaves: Leaves,
        point: AttachmentPoint,
        weight: Weight,
        quantize: Callable[[Weight], Any] | None,
    ) -> tuple[dict[str, Array], Any]:
        """The leaves and the quantised weight, where `aj.quantize` quantises an adapted model.

        Called where `from_weight` is "changes", so that a start may see both weights.

        Args:
            leaves: the arrays by name, new ones or trained ones.
            point: the weight that they adapt.
            weight: the weight in floats, as the adapted model has it; it may be abstract.
            quantize: quantises floats of the weight's shape; `.unbox()` of that is what layers
                read. None where the weight stays in floats.
        """
        return dict(leaves), weight if quantize is None else quantize(weight)

    def unready(self, leaves: Leaves) -> str:
        """Why leaves cannot train yet, with what to do; empty where they can."""
        return ""


def zeros(method: Method, leaves: Leaves) -> dict[str, Array]:
    """Zeros of the shapes and dtypes of leaves, which leave the base as it is."""
    return {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}


def merged_stacked(
    method: Method, leaves: Leaves, point: AttachmentPoint, own: Mapping[str, Array]
) -> dict[str, Array]:
    """`Method.merged` for arrays that may be stacked on layer axes."""
    shared = {name: leaves[name] for name in method.shared_leaves}

    def merged(mine: Leaves, own: Mapping[str, Array]) -> dict[str, Array]:
        return method.merged({**shared, **mine}, point, own)

    # scan and vmap of flax stack parameters on axes in front, which a method never sees: its own
    # leaves are those of one layer.
    mine, alone = {name: leaves[name] for name in method.own_leaves}, method.leaves(point)
    axes = next((len(x.shape) - len(alone[name].shape) for name, x in mine.items()), 0)
    # A vmap, so that methods are written for one layer, and products stay per layer.
    return over_layers(merged, axes)(mine, dict(own))


def started(
    method: Method, leaves: Leaves, point: AttachmentPoint, weight: Any, inputs: Any = None
) -> tuple[dict[str, Array], Any]:
    """`Method.start`, also for a quantised weight; raises RecipeError if that would change."""
    packed = is_quantized(weight)
    # In four bits the difference W - A B would round most of A B away.
    if packed and method.from_weight == "changes":
        others = method.other_starts and f", or, on this base, write {method.other_starts}"
        raise RecipeError(
            f"{type(method).__name__} starts by changing the weight at {point.path!r}, which is "
            "quantised and cannot change; adapt the float base first, then quantise the adapted "
            f"model{others}"
        )
    given = {} if inputs is None else {"inputs": inputs}
    made, rest = method.start(leaves, point, weight.unbox() if packed else weight, **given)
    return made, weight if packed else rest


def missing_members(cls: type[Method]) -> list[str]:
    """The names of the members that a class lacks to be a method."""
    lacking = [name for name in ("kind", "slot") if not hasattr(cls, name)]
    if getattr(cls, "slot", "") is not None and cls.compose is Method.compose:
        run = {"attention": "attend", "weight": "changes"}.get(cls.acts_on, "forward")
        # An inherited stub counts as missing: it would add nothing to a model, in silence.
        counts = "count" if cls.width_of is Method.width_of else "width_of"
        members = ("leaf_names", "leaves", counts, run)
        lacking += [n for n in members if getattr(cls, n) is getattr(Method, n, None)]
        abstract = "__isabstractmethod__"  # of a base class between, such as `Prompt`
        lacking += [n for n in dir(cls) if getattr(getattr(cls, n, None), abstract, False)]
    return lacking
