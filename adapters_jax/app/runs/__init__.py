"""One run: prepared, trained, resumed and stopped.

- `prepare`: a command's options, checked; `build`: its job, by its task; `config`: its record.
- `job`: trains, compares and reports; `loop`: the steps, and what they find; `log`: their metrics.
- `stopping`: Ctrl-C and SIGTERM.
"""
