"""Tiny random models of other libraries, each adapted by every method and checked.

    python -m tests.zoo        # checks the models of the libraries that are installed, and writes
                               # their part of docs/zoo.md

- `models`: what a model of the zoo is; `transformers_models`, `transformers_further`,
  `tunix_models` and `other_models` have them.
- `subjects`: a model in linen or NNX, with the same functions for the checks.
- `methods`: the recipe of each method for a model, and how many parameters it should add.
- `cells`: one model with one method: what has to hold.
- `table`: the results as Markdown.
- `function_models`, `function_cells`: the same of functions, Equinox and Haiku;
  `python -m tests.zoo.function_cells` writes their part.
"""
