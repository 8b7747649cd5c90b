"""Mutation tests: break one line of the package at a time, and see whether a test fails.

    python -m tests.mutation record                 # once: records which test runs which line
    python -m tests.mutation run methods transforms training files --sample 40

cosmic-ray makes the mutants. Each mutant is tested in a child of a process that has imported jax.
The child loads the mutated module from memory, so no file changes. It runs only the tests that run
the mutated line, the quickest first, up to the first that fails. A surviving mutant is printed with
its diff.
"""

import argparse
import ast
import contextlib
import difflib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
import xml.etree.ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "adapters_jax"
RECORD = ROOT / ".mutation"  # ignored by git
OUTCOMES = ("killed", "timeout", "survived", "not loaded", "no test")
MOST_TESTS = 40  # the most tests to run for a mutant
NOT_LOADED = 99  # the exit status of a child whose tests did not import the module
SECONDS = 120.0  # the time limit of a mutant, which counts as killed after it
# Mutants that resemble human mistakes; others, such as `+` for `<<`, hardly survive.
OPERATORS = (
    r"ReplaceBinaryOperator_(Add_Sub|Sub_Add|Mul_Div|Div_Mul|FloorDiv_Mod|Mod_FloorDiv|Pow_Mul)",
    r"ReplaceBinaryOperator_(BitOr_BitAnd|BitAnd_BitOr)",
    r"ReplaceComparisonOperator_(Lt_LtE|LtE_Lt|Gt_GtE|GtE_Gt|Eq_NotEq|NotEq_Eq)",
    r"ReplaceComparisonOperator_(Lt_Gt|Gt_Lt|Is_IsNot|IsNot_Is)",
    r"ReplaceUnaryOperator_(USub_UAdd|Delete_Not)",
    r"AddNot|NumberReplacer|ReplaceTrueWithFalse|ReplaceFalseWithTrue|ReplaceAndWithOr",
    r"ReplaceOrWithAnd|ReplaceBreakWithContinue|ReplaceContinueWithBreak|ZeroIterationForLoop",
)


def record(tests):
    """Runs all but slow tests once, and records which runs which line and how long it takes."""
    import pytest

    RECORD.mkdir(exist_ok=True)
    os.environ["COVERAGE_FILE"] = str(RECORD / "coverage")
    options = [*tests, "--cov=adapters_jax", "--cov-context=test", "--cov-report=", "-n", "2", "-q"]
    options += ["-m", "not slow or pages or hostile"]
    return pytest.main([*options, f"--junitxml={RECORD / 'durations.xml'}"])


class Record:
    """The files that `record` wrote."""

    def __init__(self):
        import coverage

        self.data = coverage.CoverageData(str(RECORD / "coverage"))
        self.data.read()
        cases = xml.etree.ElementTree.parse(RECORD / "durations.xml").iter("testcase")
        self.seconds = {}
        for case in cases:
            self.seconds[case.get("classname"), case.get("name")] = float(case.get("time"))

    def tests_of(self, path, lines):
        """The tests that run one of the lines; all of the module for a line that runs at import."""
        by_line = self.data.contexts_by_lineno(str(path))
        found = {t for n in lines for t in by_line.get(n, ())} - {""}
        found = found or {t for tests in by_line.values() for t in tests} - {""}
        ids = {test.partition("|")[0] for test in found}
        return sorted(ids, key=self._time)[:MOST_TESTS]

    def _time(self, test):
        file, _, name = test.partition("::")
        classname = file.removesuffix(".py").replace("/", ".")
        return self.seconds.get((classname, name.rpartition("::")[2]), 1.0), test


def mutants(path):
    """Yields every plausible mutation of a file, except those of annotations."""
    from cosmic_ray.commands.init import _all_work_items

    skipped = set(_annotations(ast.parse(path.read_text())))
    for item in _all_work_items([path], {}):
        (spec,) = item.mutations
        operator = spec.operator_name.rpartition("/")[2]
        plausible = any(re.fullmatch(pattern, operator) for pattern in OPERATORS)
        if plausible and tuple(spec.start_pos) not in skipped:
            yield spec


def _annotations(tree):
    """Yields the lines and columns of annotations, whose mutants change nothing."""
    for node in ast.walk(tree):
        parts = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        for part in filter(None, parts):
            for inner in ast.walk(part):
                if hasattr(inner, "lineno"):
                    columns = range(inner.col_offset, inner.end_col_offset + 1)
                    yield from ((inner.lineno, column) for column in columns)


class _Mutated(importlib.abc.MetaPathFinder, importlib.machinery.SourceFileLoader):
    """Loads one module from a mutated text instead of its file."""

    def __init__(self, name, path, text):
        super().__init__(name, str(path))
        self._text, self.loaded = text.encode(), False

    def pytest_sessionstart(self):
        """Puts this loader before pytest's, which loads modules whose doctests are run."""
        sys.meta_path.insert(0, self)

    def find_spec(self, name, path=None, target=None):
        """Returns a spec only for the mutated module."""
        if name != self.name:
            return None
        return importlib.util.spec_from_file_location(name, self.path, loader=self)

    def get_data(self, path):
        """Returns the mutated text; there is no cached bytecode."""
        if not path.endswith(".py"):
            raise OSError(path)
        self.loaded = True
        return self._text


def _module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _run_child(path, text, tests, log):
    """Runs the tests of a mutated module in a child; exits with the status of pytest."""
    import pytest

    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.setpgid(0, 0)
    sys.dont_write_bytecode = True  # cached bytecode would be used for the file
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:cov"]
    mutated = _Mutated(_module_name(path), path, text)
    status = int(pytest.main([*options, *tests], plugins=[mutated]))
    os._exit(status if mutated.loaded else NOT_LOADED)


class _Child:
    """A child process that runs the tests of a mutant."""

    def __init__(self, path, text, tests, log):
        self.end = time.monotonic() + SECONDS
        self.pid = os.fork()
        if self.pid == 0:
            _run_child(path, text, tests, log)

    def outcome(self):
        """The outcome, "killed", "survived", "not loaded" or "timeout"; None while it runs."""
        done, status = os.waitpid(self.pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return {0: "survived", NOT_LOADED: "not loaded"}.get(code, "killed")
        if time.monotonic() < self.end:
            return None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        return "timeout"


def run(rooms, sample, seed, jobs):
    """Runs a sample of each room's mutants, and prints the survivors."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    os.chdir(ROOT)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="mutation-")
    for name in ("jax", "flax", "optax", "orbax.checkpoint", "safetensors.numpy"):
        importlib.import_module(name)
    known, chosen = Record(), []
    for room in rooms:
        path = PACKAGE / room
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
        every = [(file, spec) for file in files for spec in mutants(file)]
        some = random.Random(seed).sample(every, min(sample, len(every)))
        chosen += [(room, *each) for each in some]
    for file in {file for _, file, _ in chosen}:
        _check_unbroken(file, known)
    counts = {room: dict.fromkeys(OUTCOMES, 0) for room in rooms}
    running = []
    while chosen or running:
        while chosen and len(running) < jobs:
            room, file, spec = chosen.pop()
            text = file.read_text()
            mutated = mutate_code(text, get_operator(spec.operator_name)(), spec.occurrence)
            tests = known.tests_of(file, range(spec.start_pos[0], spec.end_pos[0] + 1))
            log = tempfile.mktemp(prefix="mutant-")
            child = _Child(file, mutated, tests, log) if tests else None
            running.append((child, room, file, spec, text, mutated))
        time.sleep(0.05)
        for case in list(running):
            child, room, file, spec, text, mutated = case
            what = child.outcome() if child else "no test"
            if what:
                running.remove(case)
                counts[room][what] += 1
                _report(what, file, spec, text, mutated)
    print(json.dumps(counts, indent=1))


def _check_unbroken(file, known):
    """Exits with an error unless the tests of a file pass without a mutation."""
    every = range(1, 1 + len(file.read_text().splitlines()))
    tests, log = known.tests_of(file, every)[:5], tempfile.mktemp(prefix="mutant-")
    if not tests:
        return  # its mutants are "no test"
    child = _Child(file, file.read_text(), tests, log)
    while (what := child.outcome()) is None:
        time.sleep(0.05)
    if what != "survived":
        raise SystemExit(f"{file}: {what} without a mutation; see {log}, or run record again")


def _report(what, file, spec, text, mutated):
    """Prints a line for a mutant, with its diff if no test failed."""
    lines = difflib.unified_diff(text.splitlines(), mutated.splitlines(), lineterm="", n=1)
    shown = "" if what in ("killed", "timeout") else "\n" + "\n".join(list(lines)[2:])
    operator = spec.operator_name.rpartition("/")[2]
    print(f"{what:8}  {file.relative_to(ROOT)}:{spec.start_pos[0]}  {operator}{shown}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    options = commands.add_parser("record", help="record which test runs which line")
    options.add_argument("tests", nargs="*", help="files of tests; by default all")
    options = commands.add_parser("run", help="run mutants")
    options.add_argument("rooms", nargs="+", help="folders or files of adapters_jax, without .py")
    options.add_argument("--sample", type=int, default=40, help="mutants of each room")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    if given.command == "record":
        return record(given.tests)
    return run(given.rooms, given.sample, given.seed, given.jobs)


if __name__ == "__main__":
    raise SystemExit(main())
