"""Counting work: FLOPs of the products that a model cannot avoid. XLA's own count sees a scanned body once."""

from __future__ import annotations

import math
from collections.abc import Collection

from jaxdistill.models.schema import locate, schema
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
    """FLOPs per token of a forward pass over rows of this length: products, and causal attention's half square."""
    attention = sum(4 * layer.mixer.heads * layer.mixer.head_dim * length / 2 for layer in config.layers)
    return 2 * product_parameters(config) + attention


def training_flops(config: ModelConfig, length: int, *, frozen: Collection[str] = ()) -> float:
    """FLOPs per token of a forward and a backward pass.

    Backwards each product has two: one for its input's gradient, and one for its kernel's, which a frozen kernel does
    without. frozen: names in the stacked form (`segments.0.ffn.up.kernel`).
    """
    spared = 0
    for name in schema(config):
        path, _ = locate(config, name)
        multiplies = name.endswith(".kernel") and (config.tied or not name.startswith("embedding"))
        if multiplies and ".".join(path) in frozen:
            spared += math.prod(schema(config)[name].shape)
    return 3 * forward_flops(config, length) - 2 * spared
