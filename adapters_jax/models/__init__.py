"""Small, exact models that load Hugging Face checkpoints.

- one folder a family: `bert` (linen; BERT and RoBERTa encoders and classifiers), `gpt2` (linen;
  also GPT-3 as a shape), `llama` (NNX; also from GGUF). In each, `config` has its shape and the
  published ones, `model` its arithmetic, `checkpoint` its tensors' names, loading and saving, and
  `FAMILY` the record by which everything else knows it.
- `family`: the record's class; `registry`: `FAMILIES`, and `KNOWN`, published shapes by name.
- `parts`: what families share; blocks are scanned or unrolled, recomputed or stored in all.
- `generation`: text from a decoder.

Attention children are `attention/{query,key,value,output}` and the feed-forward's last is
`mlp/output` in all of them, so one target pattern fits every model.
"""

from adapters_jax.models.registry import FAMILIES, KNOWN, family_of

__all__ = ["FAMILIES", "KNOWN", "family_of"]
