"""The application behind `adapters-jax finetune`: assets, data, batches and metrics."""
