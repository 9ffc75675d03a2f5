"""Distil language models with JAX: a teacher goes in, a smaller model that behaves like it comes out."""
