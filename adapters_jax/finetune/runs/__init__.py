"""Prepares, trains, resumes and stops one run.

- `prepare`: checks the options of a command, and makes its job; `config`: stores them.
- `job`: trains, compares and reports; `loop`: runs the steps, and logs their metrics.
- `widened`: trains in the shapes of a larger adapter, for programs that several runs share.
- `stopping`: handles Ctrl-C and SIGTERM.
"""
