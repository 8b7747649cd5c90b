"""Fuzzing: spoilt files of every format end in documented errors, in bounded time and memory.

    python -m tests.fuzz --in-all 50000 --seed 1           # every reader, as many cases of each
    python -m tests.fuzz --cases 50000 --seed 1 --targets gguf template
    python -m tests.fuzz --corpus                          # the files made by hand
    python -m tests.fuzz --replay FILE                     # one failure again

A case is a function of its seed and number alone. With `--engine atheris` (`pip install atheris`)
the coverage of the readers guides what is tried: in 1,500 cases it reached no more lines of the
readers of PEFT's files and of pickles than the seeds alone. The results are in `.fuzz/`, and the
same command goes on where it was stopped.

- `mutators`: the ways to spoil files.
- `targets`: the readers, each with valid files.
- `cases`: runs one case within its bounds, and keeps failures.
- `corpus`: hostile files made by hand. `forked` reads each in a process of its own.
- `__main__`: the command, which runs the cases of a target in a process that it watches.
"""
