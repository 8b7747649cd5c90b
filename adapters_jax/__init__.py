"""Parameter-efficient fine-tuning for JAX and Flax.

`import adapters_jax` is quick: jax and flax are imported at the first use of a public name, so that
the command line can show its help without them. `adapters_jax.api` has the names; none of them is
also the name of a module with something else in it.
"""

import importlib.util
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from adapters_jax.api import *  # noqa: F403
else:  # a type checker that sees `__getattr__` takes any name

    def __getattr__(name: str) -> Any:
        """Imports a module of the package, or all public names at the first use of one."""
        path = f"{__name__}.{name}"
        if name.isidentifier() and importlib.util.find_spec(path):
            return importlib.import_module(path)
        if name == "__all__" or not name.startswith("__"):
            api = vars(importlib.import_module("adapters_jax.api"))
            public = {each: api[each] for each in sorted(api) if not each.startswith("_")}
            globals().update(public, __all__=list(public))
        if name not in globals():
            instead = importlib.import_module("adapters_jax.files.spelling").instead_of(name)
            message = f"module {__name__!r} has no attribute {name!r}{instead}"
            raise AttributeError(message, name=name, obj=sys.modules[__name__])
        return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *sys.modules[__name__].__all__})
