"""The sides of `python -m benchmarks peers`, one module for each library; see `benchmarks.workers`.

The side of another library runs in an environment with only that library, so it imports nothing
else that the benchmark needs.
"""
