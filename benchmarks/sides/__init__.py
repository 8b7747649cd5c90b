"""Sides of `python -m benchmarks peers`, one module a library; see `benchmarks.workers`.

A side of another library runs where only that library is installed, so nothing here imports what
the benchmark itself needs.
"""
