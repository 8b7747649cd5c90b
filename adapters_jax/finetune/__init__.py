"""The application `adapters-jax`: fine-tunes real checkpoints on real data, and serves the result.

- `cli`: the commands; `options`: their flags; `console`: what they print.
- `runs`: trains one run, from its first step to its report; `run_directory`: its files.
- `report`: tables, pictures and pages; `compare`: recipes over several seeds.
- `tasks`: what is learnt from rows; `data`: files as rows and batches.
- `gguf`: files of llama.cpp; `tensors`: parameters from and to tensors of PyTorch.
- `formats`: one class for each format of adapters, in one registry, and what servers load.
- `models`: encoders, one decoder for many families, T5; `base_files`, `pretrained`: their weights.
- `inference`: finished runs, ready to use; `serving`: one base and many adapters for many requests.
- `leaving`, `merging`: what a run becomes for others; `shapes`: models without weights.
"""
