"""Rows of text as batches of token ids.

- `readers`: reads files of every format as rows; `files` has what the formats share, `delimited`,
  `json_rows`, `columnar` and `images` have the formats.
- `layouts`: what rows are, by their columns; `tables`: chooses columns of them as texts.
- `conversations`: rows of messages; `overlap`: rows shared by train and what is held out.
- `datasets`: texts with class ids or numbers; `splits`: chooses the rows to hold out.
- `glue`, `movie_reviews`: data sets with file layouts of their own.
- `batches`: token ids in batches of few static shapes; `packing`: joins short examples.
"""
