"""What the models share: layers, blocks, functions, rotary positions and the decoder's cache."""
