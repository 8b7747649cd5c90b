"""The command: runs cases of each target in a process of its own, and counts what became of them.

A process that takes far too long, or that a signal ends, fails the case that it was at; the next
one goes on behind it. So does the next command, since the counts are in a file for each target.
"""

import argparse
import importlib.util
import json
import logging
import os
import resource
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
RESULTS = ROOT / ".fuzz"  # ignored by git
SECONDS, WAITING = 20.0, 900.0  # of computing, and of waiting, after which a process is ended
ADDRESSES = 2**33  # bytes that a process may map beside what it has mapped at its start


def results_of(target, seed, guided):
    """The file with the counts of a target."""
    return RESULTS / f"{target}-{seed}{'-guided' if guided else ''}.json"


def read_counts(path):
    """The counts of a target so far."""
    empty = {"cases": 0, "read": 0, "refused": 0, "failures": []}
    return json.loads(path.read_text()) if path.exists() else empty


def write_counts(path, counts):
    """Replaces the counts of a target."""
    path.parent.mkdir(exist_ok=True)
    path.with_suffix(".new").write_text(json.dumps(counts, indent=1))
    path.with_suffix(".new").replace(path)


def limit_memory():
    """Ends this process with a MemoryError before it takes the machine's memory."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ADDRESSES,) * 2)


def work(target, seed, stop, guided):
    """Runs the cases of a target up to a number, and says each case's before it runs."""
    logging.disable()  # what the readers say meanwhile
    if guided:
        import atheris

        with atheris.instrument_imports(include=["adapters_jax"]):
            from fuzz import targets  # noqa: F401
    from fuzz.cases import Fuzzer, save
    from fuzz.mutators import Choices

    path = results_of(target, seed, guided)
    counts = read_counts(path)
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(target, folder)
        limit_memory()

        def run(case):
            print(counts["cases"], flush=True)
            error, wrong = fuzzer.outcome(case)
            counts["refused" if error is not None else "read"] += not wrong
            if wrong:
                name = f"{target}-{seed}-{counts['cases']}.json"
                again = save(RESULTS / "failures" / name, target, wrong, case)
                counts["failures"].append([counts["cases"], wrong, again])
            counts["cases"] += 1
            write_counts(path, counts)

        if not guided:
            while counts["cases"] < stop:
                run(fuzzer.numbered(seed, counts["cases"]))
            return
        corpus = RESULTS / "corpus" / target
        corpus.mkdir(parents=True, exist_ok=True)

        def one(data):
            run(fuzzer.case(Choices(data)))
            if counts["cases"] >= stop:
                os._exit(0)

        options = [f"-seed={seed}", "-max_len=4096", "-rss_limit_mb=0", "-verbosity=0"]
        atheris.Setup(["fuzz", *options, str(corpus)], one)
        atheris.Fuzz()


def watch(target, seed, stop, guided, show):
    """Runs `work` in processes until a target has its cases; returns the counts."""
    path = results_of(target, seed, guided)
    while (counts := read_counts(path))["cases"] < stop:
        words = ["--work", target, "--seed", str(seed), "--cases", str(stop)]
        words += ["--engine", "atheris"] if guided else []
        command = [sys.executable, "-m", "tests.fuzz", *words]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
            at, why = follow(process, lambda n: show(target, n, stop))
        if why is None:
            continue
        if at is None:
            sys.exit(f"{target}: the process ended before its first case: {why}")
        counts = read_counts(path)
        again = f"python -m tests.fuzz --targets {target} --seed {seed} --case {at}"
        counts["failures"].append([at, why, "a guided case, in the corpus" if guided else again])
        write_counts(path, {**counts, "cases": at + 1})
    return counts


def processor_time(process):
    """The seconds that a process has computed; a busy machine does not count against a case."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def follow(process, show):
    """Reads a process's numbers of cases; returns the last, and why it failed, None if it did not.

    A process that computes for `SECONDS`, or waits for `WAITING`, without a number is ended.
    """
    number, rest, shown = None, b"", 0.0
    began, spent = time.monotonic(), processor_time(process)
    while True:
        ready, _, _ = select.select([process.stdout], [], [], 1.0)
        computed, waited = processor_time(process) - spent, time.monotonic() - began
        if not ready and ((number is not None and computed > SECONDS) or waited > WAITING):
            process.kill()
            return number, f"it computed for {computed:.0f} s in {waited:.0f} s"
        if not ready:
            continue
        data = os.read(process.stdout.fileno(), 2**16)
        if not data:
            break
        began, spent = time.monotonic(), processor_time(process)
        *lines, rest = (rest + data).split(b"\n")
        number = int(lines[-1]) if lines else number
        if began - shown > 1 and number is not None:
            shown = began
            show(number)
    status = process.wait()
    return number, None if status == 0 else f"the process ended with status {status}"


def corpus():
    """Reads the files made by hand; the exit status is 1 if one does not end as it should."""
    from fuzz.corpus import CORPUS
    from fuzz.forked import Forked

    failed = 0
    with Forked() as forked:
        for name in CORPUS:
            wrong = forked.wrong(name)
            failed += bool(wrong)
            print(f"{name}: {wrong or 'as it should'}", flush=True)
    return bool(failed)


def main(words):
    """Runs the command; the exit status is 1 if a case failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=1000, help="cases of each target")
    parser.add_argument("--in-all", type=int, help="cases of all targets together, in place of it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="*", metavar="TARGET", help="by default every reader")
    parser.add_argument("--engine", choices=("seeded", "atheris"), default="seeded")
    parser.add_argument("--corpus", action="store_true", help="read the files made by hand")
    parser.add_argument("--replay", metavar="FILE", help="run a failure again")
    parser.add_argument("--case", type=int, help="run one case of a target and a seed")
    parser.add_argument("--work", metavar="TARGET", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    guided = options.engine == "atheris"
    if guided and importlib.util.find_spec("atheris") is None:
        parser.error("--engine atheris needs its package: pip install atheris")
    if options.work:
        work(options.work, options.seed, options.cases, guided)
        return 0
    if options.corpus:
        return corpus()
    from fuzz.cases import Fuzzer, replay
    from fuzz.targets import TARGETS

    unknown = [name for name in options.targets or () if name not in TARGETS]
    if unknown:
        parser.error(f"--targets {' '.join(unknown)}: expected some of {', '.join(TARGETS)}")
    if options.replay or options.case is not None:
        with tempfile.TemporaryDirectory() as folder:
            if options.replay:
                wrong = replay(options.replay, folder)
            else:
                fuzzer = Fuzzer(options.targets[0], folder)
                wrong = fuzzer.outcome(fuzzer.numbered(options.seed, options.case))[1]
        print(wrong or "nothing is wrong")
        return bool(wrong)

    def show(target, number, stop):
        print(f"{target} {number} of {stop}", file=sys.stderr, flush=True)

    failed, targets = 0, options.targets or [*TARGETS]
    cases = -(-options.in_all // len(targets)) if options.in_all else options.cases
    for target in targets:
        counts = watch(target, options.seed, cases, guided, show)
        failed += len(counts["failures"])
        total = "{cases} cases, {read} read, {refused} refused".format(**counts)
        print(f"{target}: {total}, {len(counts['failures'])} failures", flush=True)
        for number, wrong, again in counts["failures"]:
            print(f"  case {number}: {wrong}; {again}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
