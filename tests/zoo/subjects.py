"""A model of the zoo in linen or NNX, with the same functions for the checks.

Both work on a pair: what is static, the linen module or the NNX graph definition, and the tree of
arrays. A base and an adapted model are such pairs.
"""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import adapters_jax as aj
from adapters_jax.trees import path_of

Pair = tuple[Any, Any]


def drawn(shapes: Any, seed: int = 0, scale: float = 0.3) -> Any:
    """Random weights of the given shapes; what has one axis, as norms have, is near one."""
    rng = np.random.default_rng(seed)

    def draw(x: Any) -> jax.Array:
        noise = scale * rng.standard_normal(x.shape)
        return jnp.asarray(noise + (len(x.shape) == 1), x.dtype)

    return jax.tree.map(draw, shapes)


def shaken(tree: Any, recipe: aj.Recipe, seed: int = 5) -> Any:
    """The tree with noise on every trained leaf, so that no factor or gate is zero."""
    rng = np.random.default_rng(seed)

    def shake(path: tuple[Any, ...], x: Any) -> Any:
        noise = 0.3 * rng.standard_normal(x.shape)
        return x + jnp.asarray(noise, x.dtype) if recipe.trains(path_of(path)) else x

    return jax.tree_util.tree_map_with_path(shake, tree)


class Linen:
    """A linen module.

    Args:
        module: the module, whose weights are drawn.
        inputs: the arguments of its call.
        read: takes the array to compare out of its output.
        scale: the standard deviation of its weights.
    """

    prompt: Any = None  # it generates nothing

    def __init__(
        self,
        module: Any,
        inputs: Sequence[Any],
        read: Callable[[Any], jax.Array] = lambda y: y,
        scale: float = 0.3,
    ):
        self.inputs: Any = tuple(inputs)
        self.read, self.args, self.kwargs = read, self.inputs, dict[str, Any]()
        shapes = jax.eval_shape(module.init, jax.random.key(0), *self.args)["params"]
        self.base: Pair = (module, drawn(shapes, scale=scale))
        self.run_base = jax.jit(functools.partial(self.run, module))

    def run(self, module: Any, params: Any, inputs: Any) -> jax.Array:
        """The output of a module."""
        return self.read(module.apply({"params": params}, *inputs))

    def adapt(self, recipe: aj.Recipe, base: Pair) -> Pair:
        """A base with adapters."""
        model, key = aj.adapt(base[0], recipe), jax.random.key(1)
        return model, aj.init_adapters(model, base[1], key, *self.args, **self.kwargs)

    def quantized(self) -> Pair:
        """The base in int8."""
        return self.base[0], aj.quantize(*self.base, *self.args, **self.kwargs, dtype="int8")

    def float_again(self, pair: Pair) -> Pair:
        """The same with float weights."""
        return pair[0], aj.dequantize(pair[1])

    def train_state(self, pair: Pair, tx: Any) -> aj.TrainState:
        """The training state before the first step."""
        return aj.TrainState.create(*pair, tx=tx, key=jax.random.key(2))

    def output_of(self, pair: Pair) -> Callable[[Any, Any], jax.Array]:
        """The output by what a loss gets, and the inputs."""
        return functools.partial(self.run, pair[0])

    def trained(self, pair: Pair, recipe: aj.Recipe) -> Any:
        """What trains."""
        return aj.partition(pair[1], recipe)[0]

    def audit(self, pair: Pair) -> aj.Audit:
        """The audit."""
        return aj.audit(*pair)

    def loaded(self, directory: Any, base: Pair) -> Pair:
        """What `load_adapter` makes of a directory and a base."""
        return aj.load_adapter(directory, *base, *self.args, **self.kwargs)

    def merged(self, pair: Pair) -> Any:
        """The base's tree with the adapters folded in."""
        return aj.merge(*pair, *self.args, **self.kwargs)


class Transformers(Linen):
    """A linen model of transformers, called as transformers calls it.

    Args:
        model: a model of transformers; its `module` is adapted, and its weights are drawn anew.
        inputs: the keyword arguments of its call.
        read: takes the array to compare out of its output.
        prompt: what `generate` starts from, and the input that holds what it returns; None where
            the model does not generate.
    """

    def __init__(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        read: Callable[[Any], jax.Array],
        prompt: tuple[Any, str] | None = None,
    ):
        self.model, self.inputs, self.read, self.prompt = model, dict(inputs), read, prompt
        self.args, self.kwargs = self._call()
        self.base: Pair = (model.module, drawn(model.params_shape_tree))
        self.run_base = jax.jit(functools.partial(self.run, model.module))
        self.generate_base = jax.jit(functools.partial(self._generate, model.module))

    def around(self, module: Any) -> Any:
        """The model of transformers around another module."""
        model = copy.copy(self.model)
        model._module = module
        return model

    def _call(self) -> tuple[Any, Any]:
        """The arguments with which transformers calls the module."""
        calls = []

        class Recorder:
            def apply(self, variables: Any, *args: Any, rngs: Any, mutable: Any = 0, **kwargs: Any):
                calls.append((args, kwargs))

        self.around(Recorder())(**self.inputs, params={"unused": 0})
        return calls[0]

    def run(self, module: Any, params: Any, inputs: Any) -> jax.Array:
        """The output of a module."""
        return self.read(self.around(module)(**inputs, params=params))

    def generate(self, module: Any, params: Any) -> jax.Array:
        """The tokens that the library's own `generate` gives, greedily."""
        return jax.jit(functools.partial(self._generate, module))(params)

    def _generate(self, module: Any, params: Any) -> jax.Array:
        start, name = self.prompt
        length = self.inputs[name].shape[1]
        return self.around(module).generate(start, params=params, max_length=length).sequences

    def scored(self, tokens: jax.Array) -> tuple[Any, int]:
        """Inputs that hold generated tokens, and how many of these were given."""
        start, name = self.prompt
        return {**self.inputs, name: tokens}, start.shape[1] if name == "input_ids" else 1


class Nnx:
    """An NNX model, with the same functions as `Linen`.

    Args:
        make: makes the model.
        inputs: the arguments of its call.
        read: takes the array to compare out of its output.
    """

    prompt: Any = None  # it generates nothing

    def __init__(
        self,
        make: Callable[[], nnx.Module],
        inputs: Sequence[Any],
        read: Callable[[Any], jax.Array] = lambda y: y,
    ):
        self.inputs, self.read = tuple(inputs), read
        graphdef, shapes = nnx.split(nnx.eval_shape(make))
        self.base: Pair = (graphdef, drawn(shapes))
        self.run_base = jax.jit(functools.partial(self.run, graphdef))

    def run(self, graphdef: Any, state: Any, inputs: Any) -> jax.Array:
        """The output of a model."""
        return self.read(nnx.merge(graphdef, state)(*inputs))

    def adapt(self, recipe: aj.Recipe, base: Pair) -> Pair:
        """A base with adapters."""
        model, rngs = nnx.merge(*base), nnx.Rngs(1)
        return nnx.split(aj.adapt(model, recipe, rngs=rngs, example_inputs=self.inputs))

    def quantized(self) -> Pair:
        """The base in int8."""
        return nnx.split(aj.quantize(nnx.merge(*self.base), *self.inputs, dtype="int8"))

    def float_again(self, pair: Pair) -> Pair:
        """The same with float weights."""
        return nnx.split(aj.dequantize(nnx.merge(*pair)))

    def train_state(self, pair: Pair, tx: Any) -> aj.TrainState:
        """The training state before the first step."""
        return aj.TrainState.create(nnx.merge(*pair), tx=tx, key=jax.random.key(2))

    def output_of(self, pair: Pair) -> Callable[[Any, Any], jax.Array]:
        """The output by what a loss gets, and the inputs."""
        return lambda model, inputs: self.read(model(*inputs))

    def trained(self, pair: Pair, recipe: aj.Recipe) -> Any:
        """What trains."""
        return nnx.state(nnx.merge(*pair), aj.nnx.AdapterParam)

    def audit(self, pair: Pair) -> aj.Audit:
        """The audit."""
        return aj.audit(nnx.merge(*pair))

    def loaded(self, directory: Any, base: Pair) -> Pair:
        """What `load_adapter` makes of a directory and a base."""
        return nnx.split(aj.load_adapter(directory, nnx.merge(*base), None, *self.inputs))

    def merged(self, pair: Pair) -> Any:
        """The base's tree with the adapters folded in."""
        return nnx.state(aj.merge(nnx.merge(*pair)))


class Tunix(Nnx):
    """An NNX model of tunix.

    Args:
        make: makes the model.
        inputs: the arguments of its call.
        sampler: makes the library's sampler of a model.
        prompt: the token ids to sample from.
    """

    def __init__(
        self,
        make: Callable[[], nnx.Module],
        inputs: Sequence[Any],
        sampler: Callable[[nnx.Module], Any],
        prompt: Any,
    ):
        super().__init__(make, inputs, lambda y: y[0])
        self.sampler, self.prompt = sampler, prompt
        self._sampler = sampler(nnx.merge(*self.base))

    def generate(self, graphdef: Any, state: Any) -> jax.Array:
        """The tokens that the library's own sampler gives, greedily."""
        return self._sampled(self.sampler(nnx.merge(graphdef, state)))

    def generate_base(self, state: Any) -> jax.Array:
        """The same for the base with another tree, without compiling again."""
        self._sampler.transformer_state = state
        return self._sampled(self._sampler)

    def _sampled(self, sampler: Any) -> jax.Array:
        texts = [" ".join(map(str, row)) for row in self.prompt]
        steps = self.inputs[0].shape[1] - self.prompt.shape[1]
        out = sampler(texts, max_generation_steps=steps, echo=True)
        return jnp.asarray(np.stack(out.tokens))

    def scored(self, tokens: jax.Array) -> tuple[Any, int]:
        """Inputs that hold generated tokens, and how many of these were given."""
        return (tokens, *self.inputs[1:]), self.prompt.shape[1]
