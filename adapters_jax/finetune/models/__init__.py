"""Small, exact models that load Hugging Face checkpoints.

- `encoder` (linen; one model for BERT, RoBERTa, DistilBERT, ELECTRA, ModernBERT, DeBERTa, and for
  the images of ViT, DINOv2 and CLIP), with classifiers; `decoder` (NNX; GPT-2, Llama, Mistral,
  Qwen, Gemma, Phi, OLMo, SmolLM, Granite and those with experts; also from GGUF); `t5` (NNX; an
  encoder that reads and a decoder that writes, of the decoder's blocks: T5, Flan-T5 and mT5);
  `whisper` (NNX; an encoder that reads log-mel features of speech). In each, `config` describes the
  shape, `model` is the arithmetic, `checkpoint` loads and saves, and a family is a file of facts in
  `families`. `bert` has the encoder by the names of BERT.
- `family`: the class of the records through which the rest of the package uses a family.
  `registry`: all records, `FAMILIES`, and published shapes, `KNOWN`; `known` finds them by name.
- `parts`: the functions that families share. Models scan their blocks where these are alike, and
  recompute them in the backward pass.
- `generation`: generates text with a decoder, which may have an encoder for the prompts.

Attention children are `attention/{query,key,value,output}` and the feed-forward's last is
`mlp/output` in every family, so one target pattern fits every model. Latent attention and the gated
delta rule have children of other names.
"""

from adapters_jax.finetune.models.registry import FAMILIES, KNOWN, family_of

__all__ = ["FAMILIES", "KNOWN", "family_of"]
