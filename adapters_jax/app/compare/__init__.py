"""Recipes, learning rates and seeds on one task, each cell a run.

- `grid`: the cells; `cells`: their directories; `comparison`: training them one after the other.
- `summary`: the results; `tradeoff`, `annotations`: the picture.
"""
