"""Base models with their tokenizers, found by name and loaded.

- `assets`: pinned models and texts that pip fetches; `locate`: where a name leads.
- `encoder`, `decoder`: a base that a task trains on.
- `base_model`: a base as files of other libraries need it.
"""
