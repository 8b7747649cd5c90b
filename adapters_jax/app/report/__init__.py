"""What a run shows: tables, curves, one HTML page, and a model card."""
