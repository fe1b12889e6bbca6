"""Mixture-of-Experts transformers whose attention and experts are parallelised separately, in JAX."""
