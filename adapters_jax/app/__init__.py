"""The application `adapters-jax`.

- `cli`: the commands; `options`: their flags; `console`: what they print.
- `runs`: a training from its first step to its report; `report`: tables, pictures and pages.
- `compare`: several recipes over seeds.
- `export`: an adapter for other libraries; `shapes`: models without weights.
"""
