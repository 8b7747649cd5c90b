"""Compares recipes on one task, over learning rates and seeds; each cell of the grid is a run.

- `options` are the flags.
- `grid` lists the cells, `cells` keeps their directories, `comparison` trains them in turn.
- `summary` writes the results and the page, `tradeoff` draws the picture.
"""
