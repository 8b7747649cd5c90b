"""Fuzzing: spoilt files of every format end in documented errors, in bounded time and memory.

    python -m tests.fuzz --cases 50000 --seed 1            # every reader
    python -m tests.fuzz --cases 50000 --seed 1 --targets gguf template
    python -m tests.fuzz --replay FILE                     # one failure again

Where atheris is installed, the coverage of the readers guides what is tried; without it, or with
`--seeded`, a case is a function of its seed and number alone. The results are in `.fuzz/`, and the
same command goes on where it was stopped.

- `mutators`: the ways to spoil files.
- `targets`: the readers, each with valid files.
- `cases`: runs one case within its bounds, and keeps failures.
- `__main__`: the command, which runs the cases of a target in a process that it watches.
"""
