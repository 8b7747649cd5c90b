"""Training: what trains apart from what stays, and a jitted step that moves it.

- `state`: what training carries from step to step.
- `step`: the training step and the evaluation step.
- `optimizers`: optimisers with groups, and LoRA+.
"""
