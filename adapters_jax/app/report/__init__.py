"""Reports a finished run or comparison as tables, pictures, an HTML page and a model card.

- `run`: the table of results, the curves and the page of a run.
- `pages`: renders a page from `templates/`.
- `card`: the model card.
"""
