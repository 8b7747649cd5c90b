"""One run: prepared, trained, resumed and stopped.

- `encoder`, `decoder`: a run on a base of that kind; `job`: what both have in common.
- `loop`: the steps, and what they find; `log`: their metrics; `stopping`: Ctrl-C and SIGTERM.
"""
