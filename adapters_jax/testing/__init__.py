"""The contract that every method keeps, as functions: for methods of other packages too.

- `contract`: `check_method`, all of it for one method.
- `checks`: the checks one by one; `subjects`: what they run on; `linen_model`, `nnx_model`.
"""

from adapters_jax.testing.contract import VARIANTS, check_method
from adapters_jax.testing.subjects import Case, ContractError, Linen, Nnx

__all__ = ["VARIANTS", "Case", "ContractError", "Linen", "Nnx", "check_method"]
