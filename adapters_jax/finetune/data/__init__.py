"""Rows of text as batches of token ids.

- `readers`: reads files of every format as rows; `files` has what the formats share, `delimited`,
  `json_rows`, `columnar` and `images` have the formats.
- `layouts`: what rows are, by their columns; `tables`: chooses columns of them as texts.
- `conversations`, `preferences`: rows of messages, and of completions to compare.
- `datasets`: labels as ids or numbers, and the parts of a task; `splits`: the rows to hold out.
- `glue`, `movie_reviews`: data sets whose files have other layouts.
- `batches`: token ids in batches of few static shapes; `packing`: joins short examples.
"""
