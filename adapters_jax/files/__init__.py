"""What is read from disk and written to it: our files, and adapters of other libraries.

- `adapter`: an adapter's directory, saved and read; `loading` puts it onto a model.
- `manifest`: `adapter_config.json`; `identity`: which base an adapter belongs to.
- `untrusted`: JSON and safetensors files of unknown origin, checked before use; `settings`: rules
  for the values in them.
- `atomic`, `checksums`: files that appear whole or not at all, and a check that they are undamaged.
- `checkpoint`: a training run that can be resumed exactly, and `checkpointed`, what it keeps of a
  state; `lock`: one process at a time.
- `stores`: object stores, `gs://` and `s3://`; `hub`: repositories of the Hugging Face Hub;
  `model_card`: the README.md beside an adapter.
- `peft`, `adapterhub`: adapters of these libraries, both ways. They share `directories`, which
  reads and writes the files, `module_map`, which finds a model's modules by their names in PyTorch,
  `names`, which maps tensors' names to our paths, and `layouts`, which converts the arrays.
- `diffusers`: LoRA of diffusion models, in the files of Diffusers, kohya and LyCORIS, both ways.
- `jax_lora`: LoRA of other JAX libraries, which is in their trees of parameters, both ways.
- `spelling`: other libraries' names, and what is written here in place of them.
"""
