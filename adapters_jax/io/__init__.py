"""What is read from disk and written to it.

- `adapter`: an adapter's directory, saved and read; `loading` puts it onto a model.
- `manifest`: `adapter_config.json`; `identity`: which base an adapter belongs to.
- `tensors`, `untrusted`: safetensors and JSON that others wrote, read with distrust.
- `atomic`, `checksums`: files that appear whole or not at all, and that are known to be undamaged.
- `checkpoint`: a training that can be resumed exactly; `run_directory`: the files of a run.
- `hub`: repositories of the Hugging Face Hub; `model_card`: the README.md beside an adapter.
"""
