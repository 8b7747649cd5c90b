"""One case: spoilt files, read within bounds of time and memory; and the file of a failure."""

import base64
import json
import random
import shutil
import time
import tracemalloc
import warnings
from pathlib import Path

from adapters_jax.errors import AdapterWarning, UserError

from .mutators import NODES, ORDINARY, Fixed, Spoilt, spoilt
from .targets import TARGETS

SECONDS = 2.0  # of processor time, of all threads
MEMORY = 2**25  # bytes beside twice those of the files
MESSAGE = 10_050  # characters of an error


class Fuzzer:
    """The cases of one target.

    Args:
        name: the target's name.
        folder: an existing directory of its own.
        only: the name of the only valid files that are used; empty for the first.
    """

    def __init__(self, name, folder, only=None):
        self.name, self.folder, self.target = name, Path(folder), TARGETS[name]
        made = self.folder / "made"
        made.mkdir()
        seeds = self.target.seeds(made)
        kept = seeds if only is None else [only or next(iter(seeds))]
        self.seeds = {key: seeds[key] for key in kept}
        for key, files in self.seeds.items():  # the readers are imported, and valid files are read
            error = self.outcome(Spoilt(key, (), files))[0]
            assert error is None, f"{name}: the valid files {key} are not read: {error}"

    def case(self, chance):
        """A case that `chance` chooses."""
        target = self.target
        nodes = ORDINARY if target.own else tuple(sorted(NODES))
        return spoilt(chance, self.seeds, target.words, target.more, nodes=nodes)

    def numbered(self, seed, number):
        """A case that a seed and a number choose."""
        return self.case(random.Random(f"{self.name}-{seed}-{number}"))

    def outcome(self, case):
        """The documented error of a case, or None; and what is wrong, empty if nothing is."""
        size = sum(len(content) for content in case.files.values())
        tracemalloc.start()
        error, wrong, took = self.timed(case)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        if not wrong and peak > 2 * size + MEMORY:
            wrong = f"it took {peak} bytes for {size}, expected at most {2 * size + MEMORY}"
        for _ in range(2 * (took > SECONDS)):  # without the cost of tracing
            took = min(took, self.timed(case)[2])
        if not wrong and took > SECONDS:
            wrong = f"it took {took:.1f} s, expected at most {SECONDS} s"
        return error, wrong

    def timed(self, case):
        """The documented error of a case, what is wrong, and the seconds that reading took."""
        directory, began = self._written(case.files), time.process_time()
        return *self._read(directory), time.process_time() - began

    def _read(self, directory):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.simplefilter("ignore", AdapterWarning)
                # Starlette leaves the file of a part that was cut off to the garbage collector.
                warnings.filterwarnings("ignore", "Unclosed file", ResourceWarning)
                self.target.read(directory)
        except UserError as error:
            long = f"a message of {len(str(error))} characters" if len(str(error)) > MESSAGE else ""
            return str(error), long
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of Rust is no Exception
            at = error.__traceback__
            while at.tb_next:
                at = at.tb_next
            place = f"{Path(at.tb_frame.f_code.co_filename).name}:{at.tb_lineno}"
            return None, f"{type(error).__name__} at {place}: {error}"[:500]
        return None, ""

    def _written(self, files):
        """A directory with these files; a text is a key of `NODES` and makes that node."""
        directory = self.folder / "hostile"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        for name, content in files.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif isinstance(content, Fixed):
                path.write_text(content)
            else:
                (self.folder / "elsewhere").write_bytes(b"{}")
                NODES[content](directory, path)
        return directory


def save(path, target, wrong, case):
    """Writes a file that reproduces a case; returns the command that does."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)

    def plain(content):
        if isinstance(content, bytes):
            return {"base64": base64.b64encode(content).decode()}
        return {"fixed" if isinstance(content, Fixed) else "node": content}

    ways = [getattr(way, "__name__", way) for way in case.ways]
    files = {name: plain(content) for name, content in case.files.items()}
    record = {"target": target, "wrong": wrong, "seed": case.seed, "ways": ways, "files": files}
    path.write_text(json.dumps(record, indent=1))
    return f"python -m tests.fuzz --replay {path}"


def load(path):
    """The target and the case that `save` wrote."""
    record = json.loads(Path(path).read_text())
    make = {"base64": base64.b64decode, "fixed": Fixed, "node": str}
    files = {}
    for name, content in record["files"].items():
        ((kind, value),) = content.items()
        files[name] = make[kind](value)
    return record["target"], Spoilt(record["seed"], tuple(record["ways"]), files)


def replay(path, folder):
    """What is wrong with a failure now; empty if nothing is."""
    target, case = load(path)
    return Fuzzer(target, folder).outcome(case)[1]
