"""Small, exact models that load Hugging Face checkpoints.

- The encoders `bert` (linen; also RoBERTa, DistilBERT and ELECTRA), `modernbert` and `deberta`
  (linen), with classifiers; `vit` (linen; ViT, DINOv2 and CLIP's image tower); `decoder` (NNX;
  GPT-2, Llama, Mistral, Qwen, Gemma, Phi, OLMo, SmolLM, Granite and those with experts, a file each
  in `decoder/families`; also from GGUF); `t5` (NNX; an encoder that reads and a decoder that
  writes: T5, Flan-T5 and mT5). In each, `config` describes the shape, `model` is the arithmetic,
  `checkpoint` names, loads and saves the tensors.
- `family`: the class of the records through which the rest of the package uses a family.
  `registry`: all records, `FAMILIES`, and published shapes, `KNOWN`; `known` finds them by name.
- `parts`: the layers and functions that families share. Models scan their blocks where these are
  alike, and recompute them in the backward pass.
- `generation`: generates text with a decoder, which may have an encoder for the prompts.

Attention children are `attention/{query,key,value,output}` and the feed-forward's last is
`mlp/output` in every family, so one target pattern fits every model.
"""

from adapters_jax.finetune.models.registry import FAMILIES, KNOWN, family_of

__all__ = ["FAMILIES", "KNOWN", "family_of"]
