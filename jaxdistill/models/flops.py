"""Counting work: FLOPs of the products that a model cannot avoid. XLA's own count sees a scanned body once."""

from __future__ import annotations

import math
from collections.abc import Collection

from jaxdistill.models.schema import locate, schema
from jaxdistill.specs import LayerSpec, MixtureOfExperts, ModelConfig


def product_parameters(config: ModelConfig) -> float:
    """Parameters that multiply a token: all kernels, the head included (also when tied), without the look-up; of a
    mixture the experts that a token chooses."""
    kernels = sum(_products(config, name) for name in schema(config) if not name.startswith("embedding"))
    return kernels + (config.vocab * config.embed if config.tied else 0)


def chosen_share(spec: LayerSpec) -> float:
    """The share of a layer's experts that one token chooses."""
    return spec.ffn.experts_per_token / spec.ffn.experts if isinstance(spec.ffn, MixtureOfExperts) else 1.0


def _products(config: ModelConfig, name: str) -> float:
    """How many of a parameter's numbers multiply a token."""
    if not name.endswith(".kernel"):
        return 0
    leaf = schema(config)[name]
    by_experts = leaf.axes[0] == "experts"
    return math.prod(leaf.shape) * (chosen_share(config.layers[int(name.split(".")[1])]) if by_experts else 1)


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
        multiplies = config.tied or not name.startswith("embedding")
        if multiplies and ".".join(path) in frozen:
            spared += _products(config, name)
    return 3 * forward_flops(config, length) - 2 * spared
