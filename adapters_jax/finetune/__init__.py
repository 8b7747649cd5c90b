"""The application behind `adapters-jax`: bases, rows, problems, jobs and finished runs."""
