"""The application `adapters-jax`.

- `cli`: the commands; `options`: their flags; `console`: what they print.
- `runs`: trains one run, from its first step to its report; `report`: tables, pictures and pages.
- `compare`: compares recipes over several seeds.
- `export`: writes adapters for other libraries; `shapes`: models without weights.
"""
