"""`python -m benchmarks NAME`: runs a benchmark, prints its tables, and writes its results."""

import argparse
import importlib
import shlex
import sys
from pathlib import Path

from benchmarks import readme
from benchmarks.harness import ROOT
from benchmarks.report import Report

TITLES = {"cola": "CoLA", "movies": "movie reviews", "stsb": "STS-B", "wnut17": "WNUT-17"}
# A benchmark is a module with `run(report, quick)`. If its name has a dash, `run` also gets the
# part after the dash. The value describes what the benchmark measures.
BENCHMARKS = {
    "accelerators": "a step by compilers of TPUs and GPUs, beside qwix, tunix, by hand; goes on",
    "attention": "bytes of a step with attention dense and by a kernel; needs libtpu, CUDA's",
    "bank": "batches whose rows have an adapter each, beside one adapter's; PEFT's too",
    "baselines": "each task on its data: baselines, the default adapter, time; an hour, goes on",
    "defaults": "passes and learning rates on 900 rows of four data sets; hours, goes on",
    "estimate": "what a plan for a CPU is off by, beside that of a TPU's compiler; needs libtpu",
    "files": "adapter files beside raw safetensors; what a checkpoint costs a training",
    "latency": "a forward pass of GPT-2 medium and BERT-base with adapters, LoRA, and it merged",
    "llama": "a decoder: the step beside one by hand, decoding with and without LoRA",
    "losses": "a loss over a large vocabulary beside those of tokamax; needs libtpu and tokamax",
    "memory": "what training holds: full fine-tuning beside LoRA, Houlsby and prompts",
    "parameters": "trainable parameters and checkpoints of GPT-3 175B and BERT-large",
    "paths": "files, functions and moves between files that common work runs through",
    "peers": "a step, latency and files beside PEFT, AdapterHub, qwix and nnx.LoRA",
    "plan": "bytes of each device in training BERT-large, LLaMA-7B and GPT-3 175B, planned",
    "scale": "compiling scanned and unrolled layers; FLOPs and traffic of devices; two processes",
    "serve": "the server's engine: clients at once, new adapters, whose answer each one is",
    "speedup": "a step of full fine-tuning over one of LoRA: FLOPs and time",
    "step": "a training step beside one written by hand; adapting and auditing; import time",
    "step-tunix": "the row of `step` on tunix's Llama alone: ours beside qwix's",
    "switch": "another task's adapter under a jitted function: time, bytes, compilations",
    "tasks": "whether training another task changes the outputs of the first one",
    "tracing": "tracing models of 32 layers with LoRA, beside tracing their bases",
    **{
        f"tradeoff-{data}": f"{what}: score against trainable parameters; hours, goes on"
        for data, what in TITLES.items()
    },
}


def _parser() -> argparse.ArgumentParser:
    known = "\n".join(f"  {name:<16} {what}" for name, what in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Runs benchmarks on this machine. Run nothing else at the same time.",
        epilog=f"benchmarks:\n{known}\n\nexamples:\n"
        "  python -m benchmarks step                 the whole, minutes\n"
        "  python -m benchmarks step --quick         toy sizes: does it run?\n"
        "  python -m benchmarks --all --out /tmp/r   all of them, results elsewhere\n"
        "  python -m benchmarks readme               put the results into README and docs",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="*", help="which to run; without a name all are listed")
    parser.add_argument("--all", action="store_true", help="run every benchmark")
    parser.add_argument("--quick", action="store_true", help="toy sizes and few rounds")
    parser.add_argument("--out", type=Path, help="directory of the results")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmarks that the arguments name; exits with status 2 on unknown arguments."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.name == ["readme"]:
        readme.write()
        return 0
    names = list(BENCHMARKS) if options.all else options.name
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        known = ", ".join(BENCHMARKS)
        parser.error(f"no benchmark is called {', '.join(unknown)}; there are: {known}")
    if not names:
        print("\n".join(f"{name:<16} {what}" for name, what in BENCHMARKS.items()))
    # Figures at toy sizes mean nothing, so they stay out of the committed directory.
    out = options.out or ROOT / ("runs/benchmarks" if options.quick else "benchmarks/results")
    for name in names:
        command = shlex.join(["python", "-m", "benchmarks", name, *["--quick"] * options.quick])
        report = Report(name, command, out)
        module, *part = name.split("-")
        importlib.import_module(f"benchmarks.{module}").run(report, options.quick, *part)
        print(report.finish())
    return 0


if __name__ == "__main__":
    sys.exit(main())
