"""What models share: attention, blocks, caches, checkpoints, names, positions, tokens."""
