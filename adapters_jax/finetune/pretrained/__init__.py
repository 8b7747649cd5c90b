"""Finds base models by name and loads them with their tokenizers.

- `assets`: pinned models and texts that pip fetches.
- `locate`: finds the files, family and tokenizer of a base by its name.
- `record`: what of them a result depends on, compared where a run is used again.
- `encoder`, `decoder`: loads a base for a task that trains or evaluates it.
- `base_model`: loads a base for conversion to and from formats of other libraries.
"""
