"""Counting work: FLOPs of the products that a model cannot avoid. XLA's own count sees a scanned body once."""

from __future__ import annotations

import math
from collections.abc import Collection

from jaxdistill.models.lora import Lora, adapted_kernels
from jaxdistill.models.schema import locate, schema
from jaxdistill.specs import LayerSpec, MixtureOfExperts, ModelConfig


def product_parameters(config: ModelConfig) -> float:
    """Parameters that multiply a token: all kernels, the head included (also when tied), without the look-up; of a
    mixture the experts that a token chooses."""
    return sum(_products(config, name) for name in schema(config))


def chosen_share(spec: LayerSpec) -> float:
    """The share of a layer's experts that one token chooses."""
    return spec.ffn.experts_per_token / spec.ffn.experts if isinstance(spec.ffn, MixtureOfExperts) else 1.0


def _products(config: ModelConfig, name: str) -> float:
    """How many of a parameter's numbers multiply a token. Those of an embedding do where it is the head."""
    leaf = schema(config)[name]
    if not leaf.inputs or (name.startswith("embedding") and not config.tied):
        return 0
    by_experts = leaf.axes[0] == "experts"
    return math.prod(leaf.shape) * (chosen_share(config.layers[int(name.split(".")[1])]) if by_experts else 1)


def forward_flops(config: ModelConfig, length: int) -> float:
    """FLOPs per token of a forward pass over rows of this length: products, and causal attention's half square, or the
    part of it that lies in a window."""
    mixers = [layer.mixer for layer in config.layers if layer.mixer is not None]
    attention = sum(4 * mixer.heads * mixer.head_dim * mean_keys(length, mixer.window) for mixer in mixers)
    return 2 * product_parameters(config) + attention


def mean_keys(length: int, window: int | None) -> float:
    """How many keys a query of a row of this length sees, on average."""
    width = length if window is None else min(window, length)
    return width - width**2 / (2 * length)


def training_flops(config: ModelConfig, length: int, *, frozen: Collection[str] = ()) -> float:
    """FLOPs per token of a forward and a backward pass.

    Backwards each product has two: one for its input's gradient, and one for its kernel's, which a frozen kernel does
    without. frozen: names in the stacked form (`segments.0.ffn.up.kernel`).
    """
    spared = sum(_products(config, name) for name in schema(config) if ".".join(locate(config, name)[0]) in frozen)
    return 3 * forward_flops(config, length) - 2 * spared


def adapter_flops(config: ModelConfig, lora: Lora, *, tokens: int) -> float:
    """FLOPs per token that adapters add to training beside frozen kernels.

    tokens: of a micro-batch, in each of which effective kernels are formed once for either direction. The gradient of
    a linear's adapters goes through thin products. Experts' and tables' kernels are differentiated whole, and that is
    taken apart.
    """
    per_token = per_batch = 0.0
    for path, leaf in adapted_kernels(config, lora).items():
        spec, forming = leaf.spec, 2 * math.prod(leaf.shape) * lora.rank
        if path[0] == "segments" and spec.axes[0] != "experts":
            fans = math.prod(spec.shape[: spec.inputs]) + math.prod(spec.shape[spec.inputs :])
            per_token += 2 * 2 * lora.rank * fans * len(leaf.members)
            per_batch += 2 * forming
        else:
            per_token += 2 * sum(_products(config, name) for name in leaf.members)
            per_batch += 4 * forming
    return per_token + per_batch / tokens
