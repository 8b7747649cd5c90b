"""Rows of text as batches of token ids.

- `readers`: files of every format as rows; `tables`: named columns of them.
- `datasets`: texts with class ids or numbers; `splits`: which rows are held out.
- `glue`, `movie_reviews`: data sets in layouts of their own.
- `batches`: token ids in batches of few static shapes; `packing`: short examples side by side.
"""
