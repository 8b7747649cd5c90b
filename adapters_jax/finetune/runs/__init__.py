"""Prepares, trains, resumes and stops one run.

- `prepare`: checks the options of a command; `build`: makes its job; `config`: stores it.
- `job`: trains, compares and reports; `loop`: runs the steps; `log`: logs their metrics.
- `stopping`: handles Ctrl-C and SIGTERM.
"""
