"""`python -m benchmarks NAME`: runs a benchmark, prints its tables, and writes its results."""

import argparse
import importlib
import shlex
import sys
from pathlib import Path

from benchmarks import readme
from benchmarks.harness import ROOT
from benchmarks.report import Report

TITLES = {
    **{"cola": "CoLA", "cola-whole": "all rows of CoLA", "movies": "movie reviews"},
    **{"stsb": "STS-B", "stsb-whole": "all rows of STS-B"},
    **{"wnut17": "WNUT-17", "wnut17-whole": "all rows of WNUT-17"},
}
# A benchmark is a module with `run(report, quick)`. If its name has a dash, `run` also gets the
# part after the dash. The value describes what the benchmark measures.
BENCHMARKS = {
    "ablations": "Houlsby's figure 6: removed layers, initial scales; an hour, resumes",
    "accelerators": "a step compiled for TPUs and GPUs; also of qwix, tunix, by hand; resumes",
    "attention": "bytes of a step with dense attention and a kernel; needs libtpu and CUDA",
    "bank": "batches with an adapter for each row, or one for all; also PEFT's",
    "bank-places": "only the part of `bank` on banks of 32, 1,024 and 4,096 places",
    "baselines": "each task on its data: baselines, default adapter, time; an hour, resumes",
    "compiling": "compiling models with LoRA, against compiling their bases",
    "defaults": "passes and learning rates on 900 rows of four data sets; hours, resumes",
    "estimate": "the error of a plan for a CPU against a TPU compiler's; needs libtpu",
    "files": "adapter files against raw safetensors; the cost of a checkpoint in training",
    "fusion": "fusion of three tasks' adapters against the best single one; an hour, resumes",
    "joined": "products with A of projections that share an input: apart, or one for all",
    "kernel": "instructions of a TPU's kernel for int4 and nf4 against its products; needs libtpu",
    "latency": "a forward pass of GPT-2 medium and BERT-base: adapters, LoRA, merged LoRA",
    "llama": "a decoder: a step against one by hand; decoding with and without LoRA",
    "losses": "a loss over a large vocabulary against tokamax's; needs libtpu and tokamax",
    "memory": "memory of training: full fine-tuning, LoRA, Houlsby's adapters, prompts",
    "methods": "PEFT's comparison of methods on Llama 3.2 3B: sizes, memory; needs CUDA; resumes",
    "parameters": "trainable parameters and checkpoints of GPT-3 175B and BERT-large",
    "paths": "files, functions and moves between files that common work runs through",
    "peers": "a step, latency and files against PEFT, AdapterHub, qwix and nnx.LoRA",
    "peers-generation": "tokens/s of SmolLM2's shapes against transformers'",
    "peers-latency": "only the latency of `peers`: LoRA, merged LoRA, Houlsby's adapters",
    "peers-linear": "a step with LoRA on all linear layers against PEFT, qwix, SkyRL",
    "peers-service": "eight tenants of our server and of SkyRL's, through Tinker's client",
    "peers-tenants": "a step of eight tenants and of one, against SkyRL's backend",
    "plan": "planned bytes on each device: BERT-large, LLaMA-7B and GPT-3 175B",
    "regret": "what LoRA needs on a decoder: ranks, rates, modules; hours, resumes",
    "reward": "reinforcement learning by Tinker's cookbook: does the reward rise?",
    "scale": "compiling scanned and unrolled layers; FLOPs and traffic; two processes",
    "serve": "the server's engine: parallel clients, new adapters, answers compared",
    "service": "a step through Tinker's client and our server, against the engine's",
    "service-churn": "10,000 tenants that come, train, save and go: the server's memory",
    "speedup": "full fine-tuning / LoRA: FLOPs and time of a step",
    "step": "a training step against one by hand; adapting and auditing; import time",
    "step-tunix": "only the row of `step` on tunix's Llama: our step against qwix's",
    "sweep": "PEFT's configurations on every family, both ways; needs torch and peft; resumes",
    "switch": "switching adapters under a jitted function: time, bytes, compilations",
    "tasks": "whether training another task changes the outputs of the first one",
    "tenants": "a step of eight tenants through the engine, of one, and alone",
    "tenants-compiled": "only the part of `tenants` by compilers: 64 tenants against one",
    "tenants-cycles": "64 tenants against one by cycles of operations, v5p; needs libtpu",
    "tracing": "tracing models of 32 layers with LoRA, against tracing their bases",
    **{
        f"tradeoff-{data}": f"{what}: score against trainable parameters; hours, resumes"
        for data, what in TITLES.items()
    },
}


def _parser() -> argparse.ArgumentParser:
    known = "\n".join(f"  {name:<19} {what}" for name, what in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Runs benchmarks on this machine. Run nothing else at the same time.",
        epilog=f"benchmarks:\n{known}\n\nexamples:\n"
        "  python -m benchmarks step                 the whole benchmark, minutes\n"
        "  python -m benchmarks step --quick         toy sizes: does it run?\n"
        "  python -m benchmarks --all --out /tmp/r   all benchmarks, results elsewhere\n"
        "  python -m benchmarks readme               put the results into README and docs",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="*", help="which to run; without a name, lists all")
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
        print("\n".join(f"{name:<19} {what}" for name, what in BENCHMARKS.items()))
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
