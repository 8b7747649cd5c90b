"""Makes preference pairs of a file of prompts with their completions, such as E2E's.

The preferred completion of a prompt is its own; the other one is that of the prompt which stands
half the file away, as E2E's are sorted. Then, for DPO:

    python examples/preference_pairs.py devset.csv pairs.jsonl --prompt mr --completion ref
    adapters-jax finetune --model smollm2-135m --train pairs.jsonl --loss dpo --method lora
"""

import argparse
import json
from pathlib import Path

from adapters_jax.finetune.data.splits import spread
from adapters_jax.finetune.data.tables import read_rows


def pairs_of(texts: list[tuple[str, str]], rows: int) -> list[dict[str, str]]:
    """Pairs of prompts that are spread over the file, each with the text of one far away."""
    first = dict(reversed(texts))  # the first completion of each prompt
    prompts = list(dict.fromkeys(prompt for prompt, _ in texts))
    chosen = spread(len(prompts), rows)
    others = [prompts[(i + len(prompts) // 2) % len(prompts)] for i in chosen]
    return [
        {"prompt": prompts[i], "chosen": first[prompts[i]], "rejected": first[other]}
        for i, other in zip(chosen, others, strict=True)
        if first[prompts[i]] != first[other]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, help="a file of rows, as adapters-jax reads it")
    parser.add_argument("out", type=Path, help="the file to write, .jsonl")
    parser.add_argument("--prompt", default="prompt", help="the column of the prompt")
    parser.add_argument("--completion", default="completion", help="the column of the completion")
    parser.add_argument("--rows", type=int, default=400, help="the largest number of pairs")
    flags = parser.parse_args()
    table = read_rows(flags.file, flags.prompt, flags.completion, None)
    pairs = pairs_of(table.texts, flags.rows)
    flags.out.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    print(f"{len(pairs)} pairs in {flags.out}")


if __name__ == "__main__":
    main()
