"""Tests of the contract that every method keeps, for methods of other packages too.

- `contract`: `check_method` runs every check on one method.
- `checks`: the checks, one function each.
- `subjects`: a recipe on a tiny model, of `linen_model` or `nnx_model`.
"""

from adapters_jax.testing.contract import check_method
from adapters_jax.testing.subjects import ContractError

__all__ = ["ContractError", "check_method"]
