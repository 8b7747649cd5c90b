"""The names of the tensors of BERT-shaped encoders in Hugging Face checkpoints."""

from dataclasses import replace

from adapters_jax.files.names import NameTable, Rule
from adapters_jax.transforms.stacking import Stack

NAMES = NameTable(
    rules=(
        Rule(r"embeddings/(word|position|token_type)", r"embeddings.\1_embeddings"),
        Rule(r"embeddings/norm", r"embeddings.LayerNorm"),
        Rule(r"layer_(\d+)/attention/(query|key|value)", r"encoder.layer.\1.attention.self.\2"),
        Rule(r"layer_(\d+)/attention/output/dense", r"encoder.layer.\1.attention.output.dense"),
        Rule(r"layer_(\d+)/attention_norm", r"encoder.layer.\1.attention.output.LayerNorm"),
        Rule(r"layer_(\d+)/mlp/intermediate", r"encoder.layer.\1.intermediate.dense"),
        Rule(r"layer_(\d+)/mlp/output/dense", r"encoder.layer.\1.output.dense"),
        Rule(r"layer_(\d+)/mlp_norm", r"encoder.layer.\1.output.LayerNorm"),
        Rule(r"pooler/dense", r"pooler.dense"),
    ),
    prefixes=("bert.", "roberta."),
    # Buffers, the pooler if it is not loaded, and the heads of pre-training and of tasks.
    ignored=(
        r"embeddings\.(position_ids|token_type_ids)",
        r"(pooler|cls|lm_head|classifier|qa_outputs)\..*",
    ),
    stack=Stack("layer_{}", "layers"),
)


def like_bert(prefix: str, *rules: Rule, ignored: tuple[str, ...] = ()) -> NameTable:
    """BERT's table with another prefix, other rules before its own, and more tensors unused."""
    return replace(
        NAMES,
        rules=(*rules, *NAMES.rules),
        prefixes=(prefix,),
        ignored=(*NAMES.ignored, *ignored),
    )
