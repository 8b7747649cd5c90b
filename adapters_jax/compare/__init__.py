"""The command `compare`: recipes, learning rates and seeds on one task, each cell a run."""
