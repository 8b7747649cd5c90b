"""What is read from disk and written to it.

- `adapter`: an adapter's directory, saved and read; `loading` puts it onto a model.
- `manifest`: `adapter_config.json`; `identity`: which base an adapter belongs to.
- `tensors`, `untrusted`: safetensors and JSON files of unknown origin, checked before use.
- `atomic`, `checksums`: files that appear whole or not at all, and a check that they are undamaged.
- `checkpoint`: a training run that can be resumed exactly; `run_directory`: the files of a run.
- `hub`: repositories of the Hugging Face Hub; `model_card`: the README.md beside an adapter.
"""
