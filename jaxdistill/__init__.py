"""Distil language models with JAX: a teacher goes in, a smaller model that behaves like it comes out."""

__version__ = "0.1.0"
