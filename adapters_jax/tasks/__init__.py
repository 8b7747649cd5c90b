"""What is learnt from rows: a loss, a score, and what outputs mean.

- `base`: what training needs to know of a task.
- `classification`: labels of texts; `outputs`: classes or numbers; `head`: the baseline.
- `generation`: completions of prompts; `completions`, `prompts`, `generation_data`: their rows.
- `metrics`: accuracy, F1, correlations, perplexity, exact match.
"""
