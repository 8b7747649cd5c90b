"""`python -m adapters_jax` is the command `adapters-jax`."""

from adapters_jax.finetune.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
