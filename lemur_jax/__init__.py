"""lemur_jax: train, convert and sample Llama-class models in JAX. Importing it imports nothing."""

__version__ = "0.1.0"
