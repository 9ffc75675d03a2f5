"""Counting work: FLOPs of the products that a model cannot avoid. XLA's own count sees a scanned body once."""

from __future__ import annotations

import math

from jaxdistill.models.schema import schema
from jaxdistill.specs import ModelConfig


def product_parameters(config: ModelConfig) -> int:
    """Parameters that multiply every token: all kernels, the head included (also when tied), without the look-up."""
    kernels = sum(
        math.prod(spec.shape)
        for name, spec in schema(config).items()
        if name.endswith(".kernel") and not name.startswith("embedding")
    )
    return kernels + (config.vocab * config.embed if config.tied else 0)


def forward_flops(config: ModelConfig, length: int) -> float:
    """FLOPs per token of a forward pass over rows of this length: products, and causal attention's half square.

    A backward pass costs twice as much again.
    """
    attention = sum(4 * layer.mixer.heads * layer.mixer.head_dim * length / 2 for layer in config.layers)
    return 2 * product_parameters(config) + attention
