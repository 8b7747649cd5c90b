"""Training: a state that keeps trained leaves apart from frozen ones, and a jitted step.

- `state`: the state that steps change.
- `step`: the training step and the evaluation step.
- `optimizers`: optimisers with groups, and LoRA+.
"""
