"""Reports a finished run or comparison as tables, pictures, an HTML page and a model card.

- `run`: the table of results and the page of a run; `findings`: what a run keeps for it.
- `pages`: renders a page from `templates/`; `pictures`: draws curves, histograms and points.
- `papers`: how to cite a run.
- `card`: the model card.
"""
