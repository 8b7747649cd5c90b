"""The parts that models share: layers, blocks, functions, rotary positions, decoder cache."""
