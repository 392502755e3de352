"""The layer in other frameworks, one module each: `torch`, `keras`, `jax`, `flax`. None is imported by the layer."""
