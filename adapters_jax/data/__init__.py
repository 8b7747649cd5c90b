"""Rows of text as batches of token ids.

- `tables`: named columns of CSV, TSV and JSON lines files.
- `datasets`: texts with class ids or numbers, split into train, dev and test.
- `glue`: GLUE in its own layouts, and the movie reviews of the demo.
- `batches`: token ids in batches of few static shapes; `packing`: short examples side by side.
"""
