"""Encoders (linen): one model for texts and images, and a file for each family in `families`.

- `config`: what a family's configuration says about the model. `layers`, `model`: the arithmetic.
- `heads`: classifiers and masked language models on an encoder.
- `checkpoint`: loads encoders and heads, and makes the records of families.
"""
